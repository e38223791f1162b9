//! HTTP framing: any bytes in any pieces give the same requests or refusal as in one piece, and stay within bounds.
#![no_main]
use libfuzzer_sys::fuzz_target;
use podvisor_api::http::{MAX_BODY, RequestHead, RequestParser};

fn parse<'b>(pieces: impl Iterator<Item = &'b [u8]>) -> Result<Vec<(RequestHead, Vec<u8>)>, u16> {
    let mut parser = RequestParser::default();
    let mut requests = Vec::new();
    for piece in pieces {
        parser.feed(piece);
        while let Some(request) = parser.next_request().map_err(|refused| refused.status)? {
            assert!(request.1.len() == request.0.content_length && request.1.len() <= MAX_BODY);
            requests.push(request);
        }
    }
    Ok(requests)
}

fuzz_target!(|data: &[u8]| {
    let Some((size, bytes)) = data.split_first() else { return };
    let whole = parse(std::iter::once(bytes));
    let cut = parse(bytes.chunks(usize::from(*size) + 1));
    assert_eq!(whole, cut);
});
