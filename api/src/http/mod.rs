//! HTTP/1.1 on a UNIX socket as the Kata shims, ch-remote and curl speak it with Cloud Hypervisor: no reason phrase in
//! the status line, keep-alive for ever, `Content-Length` spelled so, none with 204, descriptors beside the bytes.
//! Routing is the monitor's: a request is a method, a path, a body and descriptors.

mod client;
mod connection;
mod listener;
mod message;
mod parser;
mod server;
mod sys;

pub use client::{Client, Reply};
pub use listener::BindError;
pub use message::{Request, Response, causes};
pub use parser::{MAX_BODY, MAX_HEAD, Refused, RequestHead, RequestParser};
pub use server::{ConnectionId, Incoming, MAX_CONNECTIONS, Server};
