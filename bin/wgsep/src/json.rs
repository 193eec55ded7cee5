//! What there is of JSON here: strings.

use std::fmt::Write;

/// A JSON string (RFC 8259, section 7). Three more crates in a program that runs as root would be
/// too many for this.
pub fn string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            ' '..='~' => quoted.push(character),
            // A terminal may be what reads it.
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _infallible = write!(quoted, "\\u{unit:04x}");
                }
            }
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped() {
        assert_eq!(string("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
        assert_eq!(string("\u{9b}é\u{1f600}"), r#""\u009b\u00e9\ud83d\ude00""#);
    }
}
