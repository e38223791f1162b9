//! What podvisor says and hears on its API socket: the wire types of the Cloud Hypervisor REST API (which are the
//! schema, for JSON and for the command line alike), their validation, the HTTP/1.1 server on a UNIX socket with
//! descriptor passing, and a small client. Nothing here knows KVM, devices or guest memory: the monitor takes a parsed
//! request from here and hands a response back.

pub mod endpoints;
pub mod events;
pub mod http;
mod json;
mod node;
pub mod not_done;
#[cfg(feature = "openapi")]
pub mod openapi;
pub mod options;
pub mod types;
mod validate;

pub use json::{JsonError, from_json};
pub use node::FieldError;
pub use options::{OptionForm, OptionsError, from_options, from_options_with_fds, object_from_options};
pub use validate::{ConfigError, MAX_MEMORY_BYTES, MAX_QUEUE_SIZE, MAX_VCPUS, Stage};
