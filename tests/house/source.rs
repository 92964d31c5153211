//! Rust source as text: without comments and literals, without tests.

/// The source with comments, and what is between quotes, replaced by spaces. Lines stay where they are.
pub(crate) fn blank_comments_and_literals(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => end_of(bytes, at, b"\n").saturating_sub(1),
            b'/' if bytes[at..].starts_with(b"/*") => end_of(bytes, at + 2, b"*/"),
            b'r' if raw_string(bytes, at).is_some() => raw_string(bytes, at).unwrap_or(at),
            b'"' => end_of_string(bytes, at),
            b'\'' => end_of_char(bytes, at),
            _ => at,
        };
        let end = end.clamp(at, bytes.len());
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8(out).expect("every character was replaced as a whole")
}

fn end_of(bytes: &[u8], from: usize, what: &[u8]) -> usize {
    let found = bytes[from..].windows(what.len()).position(|window| window == what);
    found.map_or(bytes.len() + 1, |found| from + found + what.len())
}

/// Where a raw string that begins here ends.
fn raw_string(bytes: &[u8], at: usize) -> Option<usize> {
    if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') && bytes[at - 1] != b'b' {
        return None;
    }
    let hashes = bytes[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    if bytes.get(at + 1 + hashes) != Some(&b'"') {
        return None;
    }
    let ending = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    Some(end_of(bytes, at + 2 + hashes, &ending))
}

fn end_of_string(bytes: &[u8], at: usize) -> usize {
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != b'"' {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    end + 1
}

/// The end of a character literal; `at` for a lifetime.
fn end_of_char(bytes: &[u8], at: usize) -> usize {
    if bytes.get(at + 1) == Some(&b'\\') {
        return end_of(bytes, at + 3, b"'");
    }
    let length = match bytes.get(at + 1) {
        Some(byte) if *byte >= 0xf0 => 4,
        Some(byte) if *byte >= 0xe0 => 3,
        Some(byte) if *byte >= 0xc0 => 2,
        _ => 1,
    };
    if bytes.get(at + 1 + length) == Some(&b'\'') { at + 2 + length } else { at }
}

/// Source without items under `#[cfg(test)]`, and the names of the modules among these.
pub(crate) fn without_tests(blanked: &str) -> (String, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let (mut kept, mut modules, mut rest) = (String::new(), Vec::new(), blanked);
    while let Some((before, after)) = rest.split_once(MARK) {
        kept.push_str(before);
        let end = end_of_item(after);
        let words: Vec<&str> = after[..end].split(|c: char| !is_word(c)).filter(|w| !w.is_empty()).collect();
        if let Some(at) = words.iter().position(|word| *word == "mod") {
            modules.extend(words.get(at + 1).map(ToString::to_string));
        }
        rest = &after[end..];
    }
    kept.push_str(rest);
    (kept, modules)
}

/// An item ends at its first semicolon outside braces, or with the brace that closes its first.
fn end_of_item(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '}' if depth == 1 => return at + 1,
            '}' => depth -= 1,
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether a character may be part of an identifier.
pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[test]
fn comments_literals_and_tests_are_left_out() {
    let source = "use a::b; // use c::d;\nlet x = \"crate::e\"; let y = r#\"\"crate::f\"#; let 'l: &'a T = '\\'';\n\
                  #[cfg(test)]\nmod tests { fn f() { g(); } }\nfn h() {}\n#[cfg(test)]\nmod more;\n";
    let (kept, modules) = without_tests(&blank_comments_and_literals(source));
    assert_eq!(
        kept.split_whitespace().collect::<Vec<_>>().join(" "),
        "use a::b; let x = ; let y = ; let 'l: &'a T = ; fn h() {}"
    );
    assert_eq!(modules, ["tests", "more"]);
    assert_eq!(kept.matches('\n').count(), 5);
}
