//! The API socket in the control loop.

use std::error::Error;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use podvisor_api::http::{Response, Server};

use crate::handlers::{Call, State, answer};
use crate::pod::{Events, PodSlot};

/// The socket.
pub struct ApiSocket(Server);

impl ApiSocket {
    /// Opens `PATH`, `path=PATH` or `fd=N`.
    ///
    /// # Errors
    /// When it cannot be served.
    pub fn open(text: &str) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let path = text.strip_prefix("path=").unwrap_or(text);
        Ok(Self(Server::bind(Path::new(path))?))
    }
    /// Serves.
    pub fn serve(&mut self, pod: &mut PodSlot, events: &mut Events, shutdown: &mut bool) {
        for incoming in self.0.poll() {
            let call = Call {
                method: &incoming.request.method,
                path: &incoming.request.path,
                body: &incoming.request.body,
            };
            let reply = answer(&mut State { pod, events, shutdown }, &call);
            self.0.respond(
                incoming.connection,
                &Response::new(reply.status, reply.body.unwrap_or_default()),
            );
        }
    }
    /// Flushes.
    pub fn flush(&mut self) {
        self.0.drain();
    }
}
impl AsRawFd for ApiSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
