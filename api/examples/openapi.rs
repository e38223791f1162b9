//! Prints the OpenAPI description of the API, made from the wire types.

use std::io::Write;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(podvisor_api::openapi::yaml().as_bytes())
}
