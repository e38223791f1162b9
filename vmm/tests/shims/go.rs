//! The Go shim's side of the wire: the generated client over net/http with pooled connections, each request in one
//! write; and the connection of its own that carries `vm.add-net` with the TAP queues.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::common::PATIENCE;

/// What the generated client makes of an answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) content_type: Option<String>,
    pub(crate) body: Vec<u8>,
}

/// The shim's client: connections that are open and idle are used again.
pub(crate) struct Client {
    socket: PathBuf,
    idle: Vec<BufReader<UnixStream>>,
    /// Connections opened so far.
    pub(crate) dialled: usize,
}

/// The request as net/http writes it: Host, User-Agent, Content-Length, then the rest in the order of the names.
pub(crate) fn request(method: &str, endpoint: &str, body: Option<&str>) -> String {
    let mut text = format!(
        "{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: OpenAPI-Generator/1.0.0/go\r\n"
    );
    if method == "PUT" || body.is_some() {
        text += &format!("Content-Length: {}\r\n", body.map_or(0, str::len));
    }
    if matches!(endpoint, "vmm.ping" | "vm.info" | "vm.add-disk" | "vm.add-device") {
        text += "Accept: application/json\r\n";
    }
    if body.is_some() {
        text += "Content-Type: application/json\r\n";
    }
    text += "Accept-Encoding: gzip\r\n\r\n";
    text + body.unwrap_or_default()
}

/// One answer, read as http.ReadResponse does.
fn read_response(from: &mut BufReader<UnixStream>) -> Result<Reply, String> {
    let mut line = String::new();
    let mut next = |from: &mut BufReader<UnixStream>| {
        line.clear();
        match from.read_line(&mut line) {
            Ok(0) => Err("unexpected EOF".to_owned()),
            Ok(_) => Ok(line.trim_end_matches(['\r', '\n']).to_owned()),
            Err(error) => Err(error.to_string()),
        }
    };
    let status = next(from)?;
    let (protocol, rest) = status.split_once(' ').ok_or("malformed HTTP response")?;
    if !protocol.starts_with("HTTP/1.") {
        return Err(format!("malformed HTTP version {protocol:?}"));
    }
    let code = rest.trim_start().split(' ').next().unwrap_or_default();
    let status = match code.parse() {
        Ok(status) if code.len() == 3 => status,
        _ => return Err(format!("malformed HTTP status code {code:?}")),
    };
    let (mut length, mut content_type) = (None, None);
    loop {
        let header = next(from)?;
        if header.is_empty() {
            break;
        }
        let (name, value) = header
            .split_once(':')
            .ok_or(format!("malformed MIME header {header:?}"))?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = Some(value.trim().parse::<usize>().map_err(|e| e.to_string())?),
            "content-type" => content_type = Some(value.trim().to_owned()),
            "transfer-encoding" => return Err("the answer comes in chunks".to_owned()),
            _ => {}
        }
    }
    let length = match (status, length) {
        (204, _) => 0,
        (_, Some(length)) => length,
        (_, None) => return Err("an answer without a length ends with its connection".to_owned()),
    };
    let mut body = vec![0; length];
    from.read_exact(&mut body).map_err(|e| e.to_string())?;
    if !from.buffer().is_empty() {
        return Err("Unsolicited response received on idle HTTP channel".to_owned());
    }
    Ok(Reply {
        status,
        content_type,
        body,
    })
}

fn dial(socket: &Path) -> Result<BufReader<UnixStream>, String> {
    // The shim itself refuses a longer path.
    assert!(socket.as_os_str().len() <= 107);
    let stream = UnixStream::connect(socket).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    Ok(BufReader::new(stream))
}

/// What the generated client does with a body: without this content type there is nothing it can decode.
pub(crate) fn decode(reply: &Reply) -> Result<Value, String> {
    match &reply.content_type {
        Some(kind) if kind.contains("json") => serde_json::from_slice(&reply.body).map_err(|e| e.to_string()),
        _ => Err("undefined response type".to_owned()),
    }
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            idle: Vec::new(),
            dialled: 0,
        }
    }

    fn connection(&mut self) -> Result<BufReader<UnixStream>, String> {
        if let Some(open) = self.idle.pop() {
            return Ok(open);
        }
        self.dialled += 1;
        dial(&self.socket)
    }

    fn exchange(&mut self, method: &str, endpoint: &str, body: Option<&Value>) -> Result<Reply, String> {
        let mut connection = self.connection()?;
        let body = body.map(Value::to_string);
        let text = request(method, endpoint, body.as_deref());
        connection
            .get_mut()
            .write_all(text.as_bytes())
            .map_err(|e| e.to_string())?;
        let reply = read_response(&mut connection)?;
        self.idle.push(connection);
        if reply.status >= 300 {
            return Err(format!("{}: {}", reply.status, String::from_utf8_lossy(&reply.body)));
        }
        Ok(reply)
    }

    /// A request whose answer has a body that the shim decodes.
    pub(crate) fn get(&mut self, endpoint: &str) -> Result<Value, String> {
        decode(&self.exchange("GET", endpoint, None)?)
    }

    /// A request of which only the status counts.
    pub(crate) fn put(&mut self, endpoint: &str, body: Option<&Value>) -> Result<(), String> {
        self.exchange("PUT", endpoint, body).map(drop)
    }

    /// `vm.add-disk` and `vm.add-device`: the identifier and where the device is.
    pub(crate) fn add(&mut self, endpoint: &str, body: &Value) -> Result<(String, String), String> {
        let info = decode(&self.exchange("PUT", endpoint, Some(body))?)?;
        pci_device_info(&info)
    }

    /// The state that `vm.info` tells.
    pub(crate) fn state(&mut self) -> String {
        self.get("vm.info").unwrap()["state"].as_str().unwrap().to_owned()
    }

    /// `vm.add-net` for each network, on a connection of its own that is closed afterwards. Each request is one
    /// sendmsg with its queues; an answer without a body gives `None`.
    pub(crate) fn add_nets(&self, nets: &[(Value, BorrowedFd<'_>)]) -> Result<Vec<Option<(String, String)>>, String> {
        let mut connection = dial(&self.socket)?;
        let mut added = Vec::new();
        for (body, tap) in nets {
            let text = dumped_request(&body.to_string());
            let sent = connection
                .get_ref()
                .send_with_fds(&[text.as_bytes()], &[tap.as_raw_fd()])
                .map_err(|e| e.to_string())?;
            assert_eq!(sent, text.len());
            let reply = read_response(&mut connection)?;
            if !matches!(reply.status, 200 | 204) {
                return Err(format!("{}: {}", reply.status, String::from_utf8_lossy(&reply.body)));
            }
            added.push(if reply.body.is_empty() {
                None
            } else {
                let info = serde_json::from_slice(&reply.body).map_err(|e| e.to_string())?;
                Some(pci_device_info(&info)?)
            });
        }
        Ok(added)
    }
}

/// `vm.add-net` as httputil.DumpRequest writes it.
pub(crate) fn dumped_request(body: &str) -> String {
    format!(
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Length: {}\r\n\
         Content-Type: application/json\r\n\r\n{body}",
        body.len()
    )
}

/// Both fields are required.
fn pci_device_info(info: &Value) -> Result<(String, String), String> {
    let field = |name: &str| {
        info[name]
            .as_str()
            .map(str::to_owned)
            .ok_or(format!("no {name} in {info}"))
    };
    Ok((field("id")?, field("bdf")?))
}

/// The device number of a BDF, by the rule of both shims: domain 0000, bus 00, two hexadecimal digits, function 0.
pub(crate) fn slot_of(bdf: &str) -> Result<u8, String> {
    let tokens: Vec<_> = bdf.split(':').collect();
    let [domain, bus, rest] = tokens.as_slice() else {
        return Err(format!("{bdf}: not three tokens"));
    };
    if (*domain, *bus) != ("0000", "00") {
        return Err(format!("{bdf}: not on the first bus"));
    }
    match rest.split_once('.') {
        Some((device, "0")) if device.len() == 2 => u8::from_str_radix(device, 16).map_err(|e| format!("{bdf}: {e}")),
        _ => Err(format!("{bdf}: not DD.0")),
    }
}
