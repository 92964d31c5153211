use super::*;

const BOUNDS: HeadBounds = HeadBounds { bytes: 2000, fields: 5, target_bytes: 300 };

fn follow(text: &str) -> Result<Framing, Violation> {
    let mut framing = Framing::new(BOUNDS);
    framing.follow(text.as_bytes()).map(|()| framing)
}

fn status(text: &str) -> Option<u16> {
    follow(text).err().map(|violation| violation.status.as_u16())
}

const GOOD: &[&str] = &[
    "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\na\n\r",
    "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\na\nc\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: y\r\n\r\n",
    "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n03;a=b\r\nabc\r\n00 ;c\r\nX: 1\r\nAuthorization: b\r\n\r\n",
    "GET /\u{e9} HTTP/1.1\r\nHost: x\r\nX: \u{e9}\t \r\nY:\r\n\r\n",
];

const BAD: &[(&str, u16)] = &[
    ("GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
    ("\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("\r\n\r\n\r\n\r\n\r\n\r\n", 400),
    ("\r\rGET / HTTP/1.1\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\n\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\nA: b\rC: d\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\nA: b\0\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    ("GET / HTTP/9.9\r\nHost: x\r\n\r\n", 505),
    ("GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    ("GET / http/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /\r\n\r\n", 400),
    ("GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET / a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (" GET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("G(T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /\t HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \u{b}chunked\r\n\r\n", 400),
    ("POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
];

const BAD_CHUNKS: &[&str] = &[
    "3 \r\nabc\r\n",
    "3\nabc\r\n",
    "-1\r\n",
    "+1\r\n",
    "0x3\r\n",
    "5_0\r\n",
    "\r\n",
    "1000000000000000\r\n",
    "3;a\nb\r\nabc\r\n",
    "3;a\rb\r\nabc\r\n",
    "3;a\u{1}\r\nabc\r\n",
    "3\r\nabcd\r\n",
    "3\r\nabc\n",
    "3\r\nabc0\r\n\r\n",
    "0\r\nbad trailer\r\n\r\n",
    "0\r\nA: b\n\r\n",
];

#[test]
fn what_the_grammar_allows_passes_in_pieces_of_any_size() {
    for text in GOOD {
        for size in 1..=text.len() {
            let mut framing = Framing::new(BOUNDS);
            for piece in text.as_bytes().chunks(size) {
                assert_eq!(framing.follow(piece), Ok(()), "{text:?} in pieces of {size}");
            }
            assert!(!framing.in_head(), "{text:?}");
        }
    }
}

#[test]
fn what_breaks_the_grammar_is_refused_in_pieces_of_any_size() {
    let chunks = BAD_CHUNKS.iter().map(|chunk| {
        (format!("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}"), 400)
    });
    for (text, want) in BAD.iter().map(|(text, status)| ((*text).to_owned(), *status)).chain(chunks) {
        assert_eq!(status(&text), Some(want), "{text:?}");
        for size in 1..text.len() {
            let mut framing = Framing::new(BOUNDS);
            let refused = text.as_bytes().chunks(size).find_map(|piece| framing.follow(piece).err());
            assert_eq!(refused.map(|v| v.status.as_u16()), Some(want), "{text:?} in pieces of {size}");
        }
    }
}

#[test]
fn sizes_and_counts_have_bounds() {
    let target = format!("GET /{} HTTP/1.1\r\n", "a".repeat(300));
    assert_eq!(status(&target), Some(414));
    assert_eq!(status(&target[..305]), Some(414), "before its end has come");
    let fields = "A: b\r\n".repeat(5);
    assert_eq!(status(&format!("GET / HTTP/1.0\r\n{fields}\r\n")), None);
    assert_eq!(status(&format!("GET / HTTP/1.0\r\n{fields}A: b\r\n")), Some(431));
    assert_eq!(status(&format!("GET / HTTP/1.0\r\nA: {}", "b".repeat(2000))), Some(431));
    let chunked = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(status(&format!("{chunked}1;{}", "a".repeat(5000))), Some(400));
    assert_eq!(status(&format!("{chunked}0\r\n{}", "A: b\r\n".repeat(4000))), Some(400));
    let framing = follow(&format!("{chunked}5;{}\r\nab", "a".repeat(3000))).expect("within the bound");
    assert!(framing.line.capacity() <= 2 * LINE_KEPT_BYTES, "of a long line only the beginning is kept");
}

#[test]
fn it_is_told_where_a_message_stands() {
    assert!(follow("GET / HTTP/1.1\r\nHo").expect("good so far").in_head());
    assert!(follow("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nab").expect("good").in_body());
    assert!(!follow("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc").expect("good").in_body());
}

#[test]
fn half_of_an_empty_line_behind_a_message_waits_for_its_other_half() {
    let good = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab";
    let mut framing = Framing::new(BOUNDS);
    assert!(framing.follow(format!("{good}\r").as_bytes()).is_ok());
    assert_eq!(framing.checked(), good.len());
    assert!(framing.follow(b"\n").is_ok());
    assert_eq!(framing.checked(), 1);
}

#[test]
fn of_a_read_that_ends_badly_what_came_before_can_be_served() {
    let good = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab";
    let mut framing = Framing::new(BOUNDS);
    assert!(framing.follow(format!("{good}{good}GET / HTTP/1.1\nHost: x\r\n").as_bytes()).is_err());
    assert_eq!(framing.checked(), 2 * good.len());
    let mut framing = Framing::new(BOUNDS);
    assert!(framing.follow(b"GET / HTTP/1.1\r\nHost: x\n").is_err());
    assert_eq!(framing.checked(), "GET / HTTP/1.1\r\n".len());
}

#[test]
fn only_whole_lines_of_a_head_and_all_of_a_body_are_checked() {
    let mut framing = Framing::new(BOUNDS);
    for (bytes, checked) in [
        ("GE", 0),
        ("T / HTTP/1.1\r", 0),
        ("\nHost", 1),
        (": x\r\nTransfer-Encoding: chunked\r\n\r\n5;a", 35),
        ("\r\nab", 4),
        ("cde\r\n0", 5),
    ] {
        framing.follow(bytes.as_bytes()).expect("good");
        assert_eq!(framing.checked(), checked, "{bytes:?}");
    }
}
