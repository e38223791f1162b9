//! The API socket in the control loop: requests go to the handlers, their replies back to whom they came from.

use std::error::Error;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use podvisor_api::http::{Response, Server};

use crate::handlers::{Call, State, answer};
use crate::pod::{Events, PodSlot};
use crate::sys;

/// The socket and its connections.
pub struct ApiSocket(Server);

impl ApiSocket {
    /// Serves what `--api-socket` names: `PATH`, `path=PATH`, or `fd=N` for a listening socket that was inherited.
    ///
    /// # Errors
    /// When another process serves the path, or it cannot be bound, or N is no listening UNIX socket.
    pub fn open(text: &str) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let server = if let Some(number) = text.strip_prefix("fd=") {
            let fd = number
                .parse()
                .map_err(|_| format!("--api-socket fd={number}: not a descriptor's number"))?;
            let fd = sys::inherited_listener(fd).map_err(|e| format!("--api-socket fd={number}: {e}"))?;
            Server::from_fd(fd)?
        } else {
            Server::bind(Path::new(text.strip_prefix("path=").unwrap_or(text)))?
        };
        Ok(Self(server))
    }

    /// Answers the requests that have arrived.
    pub fn serve(&mut self, pod: &mut PodSlot, events: &mut Events, shutdown: &mut bool) {
        for mut incoming in self.0.poll() {
            let files = std::mem::take(&mut incoming.request.files);
            let call = Call {
                method: &incoming.request.method,
                path: &incoming.request.path,
                body: &incoming.request.body,
            };
            let reply = answer(
                &mut State {
                    pod,
                    events,
                    shutdown,
                    files,
                },
                &call,
            );
            let response = Response::new(reply.status, reply.body.unwrap_or_default());
            self.0.respond(incoming.connection, &response);
        }
    }

    /// Writes out what clients have not yet taken, before the process ends.
    pub fn flush(&mut self) {
        self.0.drain();
    }
}

impl AsRawFd for ApiSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
