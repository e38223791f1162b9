//! Requests are the same however they are cut, and bounded whatever they are.

use super::*;
use proptest::prelude::*;

type Requests = Vec<(RequestHead, Vec<u8>)>;

fn parse_cut(bytes: &[u8], cuts: &[usize]) -> Result<Requests, Refused> {
    let mut parser = RequestParser::default();
    let mut requests = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([bytes.len()]) {
        parser.feed(&bytes[from..to]);
        from = to;
        while let Some(request) = parser.next_request()? {
            requests.push(request);
        }
    }
    Ok(requests)
}

const GO: &[u8] = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nUser-Agent: OpenAPI-Generator/1.0.0/go\r\nContent-Length: 13\r\nAccept: application/json\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n{\"a\":\"\r\n\r\n\"}\n";
const RUST: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";

#[test]
fn cut_at_every_byte_it_is_the_same() {
    let both = [
        GO,
        RUST,
        b"PUT http://localhost/api/v1/vm.boot HTTP/1.1\r\ncontent-length:  0\r\n\r\n",
        GO,
    ]
    .concat();
    let whole = parse_cut(&both, &[]).unwrap();
    let paths: Vec<&str> = whole.iter().map(|(head, _)| head.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "/api/v1/vm.create",
            "/api/v1/vmm.ping",
            "/api/v1/vm.boot",
            "/api/v1/vm.create"
        ]
    );
    assert_eq!((whole[0].1.len(), whole[2].1.len()), (13, 0));
    for at in 0..both.len() {
        assert_eq!(parse_cut(&both, &[at]).unwrap(), whole, "cut at {at}");
    }
    assert_eq!(parse_cut(&both, &(0..both.len()).collect::<Vec<_>>()).unwrap(), whole);
}

#[test]
fn what_breaks_the_framing_is_refused() {
    let head = |line: &str| format!("PUT / HTTP/1.1\r\n{line}\r\n\r\n");
    let rows = [
        (head("Content-Length: -1"), 400),
        (head("Content-Length: +1"), 400),
        (head("Content-Length: 1 1"), 400),
        (head("Content-Length: "), 400),
        (head("Content-Length: 4194305"), 413),
        (head("Content-Length: 99999999999999999999999"), 413),
        (head("Content-Length: 1\r\nContent-Length: 2"), 400),
        (head("Transfer-Encoding: chunked"), 400),
        (head(&format!("X: {}", "x".repeat(MAX_HEAD))), 431),
        (head(&"X: y\r\n".repeat(65)), 431),
        ("\0\0\0".to_owned(), 400),
        ("GET / HTTP/2.0\r\n\r\n".to_owned(), 400),
        ("GET  HTTP/1.1\r\n\r\n".to_owned(), 400),
    ];
    for (text, status) in rows {
        let error = parse_cut(text.as_bytes(), &[]).unwrap_err();
        assert_eq!(error.status, status, "{:.60}: {error}", text);
    }
    assert_eq!(
        parse_cut(&head("Content-Length: 4194304").into_bytes(), &[]),
        Ok(vec![])
    );
}

#[test]
fn leave_to_send_is_given_once_and_only_when_it_is_waited_for() {
    let mut parser = RequestParser::default();
    parser.feed(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(parser.next_request(), Ok(None));
    assert!(parser.take_expectation());
    assert!(!parser.take_expectation());
    parser.feed(b"{}");
    assert_eq!(parser.next_request().unwrap().unwrap().1, b"{}");
    assert!(!parser.take_expectation());
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces_give_the_same(bytes in prop::collection::vec(any::<u8>(), 0..300), cuts in prop::collection::vec(0usize..300, 0..6)) {
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= bytes.len()).collect();
        cuts.sort_unstable();
        prop_assert_eq!(parse_cut(&bytes, &cuts).map_err(|e| e.status), parse_cut(&bytes, &[]).map_err(|e| e.status));
    }
}
