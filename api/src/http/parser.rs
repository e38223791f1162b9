//! From bytes to requests, however the bytes are cut. Bounded: a head of at most [`MAX_HEAD`] bytes, a body of at most
//! [`MAX_BODY`], and memory only for bytes that have come.

/// Most bytes of the request line and headers.
pub const MAX_HEAD: usize = 16 << 10;
/// Most bytes of a body; Cloud Hypervisor's limit.
pub const MAX_BODY: usize = 4 << 20;
/// Most header lines.
const MAX_HEADERS: usize = 64;

/// What is wrong with the bytes; what follows them cannot be understood, so the connection ends with the answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// The status to answer with.
    pub status: u16,
    /// What is wrong and what is accepted.
    pub reason: String,
}

impl Refused {
    fn new(status: u16, reason: impl Into<String>) -> Self {
        Self {
            status,
            reason: reason.into(),
        }
    }
}

/// Request line and the headers that matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// The method.
    pub method: String,
    /// The path from its first slash.
    pub path: String,
    /// Bytes of body to come.
    pub content_length: usize,
    /// The client waits for leave to send the body (`Expect: 100-continue`).
    pub expects_continue: bool,
}

/// Takes bytes as they come and gives requests.
#[derive(Debug, Default)]
pub struct RequestParser {
    buffer: Vec<u8>,
    head: Option<RequestHead>,
}

impl RequestParser {
    /// Adds bytes from the client.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes held.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Whether the head has come and its body is still awaited with `Expect: 100-continue`; true once for a request.
    pub fn take_expectation(&mut self) -> bool {
        let missing = self
            .head
            .as_ref()
            .is_some_and(|head| self.buffer.len() < head.content_length);
        self.head
            .as_mut()
            .is_some_and(|head| std::mem::take(&mut head.expects_continue))
            && missing
    }

    /// The next complete request and its body, if all of it has come.
    ///
    /// # Errors
    /// [`Refused`]; the parser must not be used any further.
    pub fn next_request(&mut self) -> Result<Option<(RequestHead, Vec<u8>)>, Refused> {
        let head = match self.head.take() {
            Some(head) => head,
            None => match parse_head(&self.buffer)? {
                Some((head, length)) => {
                    self.buffer.drain(..length);
                    head
                }
                None => return Ok(None),
            },
        };
        if self.buffer.len() < head.content_length {
            self.head = Some(head);
            return Ok(None);
        }
        let rest = self.buffer.split_off(head.content_length);
        let body = std::mem::replace(&mut self.buffer, rest);
        Ok(Some((head, body)))
    }
}

/// The head at the start of `bytes` and its length, once all of it is there.
fn parse_head(bytes: &[u8]) -> Result<Option<(RequestHead, usize)>, Refused> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let window = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(window) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) => {
            return Err(Refused::new(
                431,
                format!("the request's headers are longer than {MAX_HEAD} bytes; send fewer"),
            ));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Refused::new(
                431,
                format!("the request has more than {MAX_HEADERS} headers; send fewer"),
            ));
        }
        Err(error) => return Err(Refused::new(400, format!("this is no HTTP/1.1 request: {error}"))),
    };
    let path = request.path.unwrap_or("/");
    let path = match path.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => path,
    };
    let mut head = RequestHead {
        method: request.method.unwrap_or_default().to_owned(),
        path: path.to_owned(),
        content_length: 0,
        expects_continue: false,
    };
    let mut length_seen = None;
    for header in request.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = content_length(header.value)?;
            if length_seen.is_some_and(|seen| seen != value) {
                return Err(Refused::new(
                    400,
                    "Content-Length is given twice and differs; give it once",
                ));
            }
            length_seen = Some(value);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Refused::new(
                400,
                "Transfer-Encoding is not accepted; send the body with Content-Length",
            ));
        } else if header.name.eq_ignore_ascii_case("expect") {
            head.expects_continue = header.value.eq_ignore_ascii_case(b"100-continue");
        }
    }
    head.content_length = length_seen.unwrap_or(0);
    Ok(Some((head, length)))
}

fn content_length(value: &[u8]) -> Result<usize, Refused> {
    let text = std::str::from_utf8(value).unwrap_or_default().trim();
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits {
        return Err(Refused::new(400, format!("Content-Length `{text}` is no number")));
    }
    match text.parse::<usize>() {
        Ok(length) if length <= MAX_BODY => Ok(length),
        _ => Err(Refused::new(
            413,
            format!("a body of {text} bytes is too long; send at most {MAX_BODY}"),
        )),
    }
}

#[cfg(test)]
mod tests;
