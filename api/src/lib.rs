//! What podvisor says and hears on its API socket: the wire types of the Cloud Hypervisor REST API (which are the
//! schema, for JSON and for the command line alike), their validation, the HTTP/1.1 server on a UNIX socket with
//! descriptor passing, and a small client. Nothing here knows KVM, devices or guest memory: the monitor takes a parsed
//! request from here and hands a response back.
//!
//! ```no_run
//! use podvisor_api::endpoints::EndpointId;
//! use podvisor_api::http::Client;
//! use podvisor_api::types::{DiskConfig, PciDeviceInfo, VmInfo};
//! use podvisor_api::{from_json, from_options};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut client = Client::connect("/run/pod/api.sock".as_ref())?;
//! let info: VmInfo = from_json(&client.request("GET", "vm.info", None)?.body)?;
//! println!("{:?}, {} vCPUs", info.state, info.config.cpus.boot_vcpus);
//!
//! // The command line's spelling of a disk, sent as the API's JSON.
//! let disk: DiskConfig = from_options("path=data.img,readonly=on")?;
//! let add = EndpointId::VmAddDisk.endpoint();
//! let reply = client.request(add.method.as_str(), add.name, Some(&serde_json::to_vec(&disk)?))?;
//! match reply.status {
//!     200 => println!("at {}", from_json::<PciDeviceInfo>(&reply.body)?.bdf),
//!     204 => println!("with the next boot"),
//!     status => println!("{status}: {}", String::from_utf8_lossy(&reply.body)),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What is wrong with a configuration is told before it is sent, by field, value and remedy:
//!
//! ```
//! use podvisor_api::types::VmConfig;
//! use podvisor_api::{Stage, from_json};
//!
//! let config: VmConfig = from_json(br#"{"disks": [{"path": "/a", "queue_size": 100}]}"#)?;
//! let error = config.validate(Stage::Create).unwrap_err();
//! assert_eq!(error.field, "disks[0].queue_size");
//! # Ok::<(), podvisor_api::JsonError>(())
//! ```

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
