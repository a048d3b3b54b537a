//! A strict streaming reader for the JSON of safetensors headers and shard indexes (RFC 8259). It builds no tree:
//! it allocates only names written with escapes, and every error knows its byte.

use std::borrow::Cow;

use crate::error::CheckpointError;
use crate::limits::MAX_NAME_BYTES;

/// Deepest nesting of a value that is skipped.
const MAX_SKIPPED_NESTING: usize = 32;

/// A position in a JSON text that stands at `base` in its file.
pub(crate) struct JsonReader<'a> {
    text: &'a str,
    position: usize,
    base: usize,
    what: &'static str,
}

/// How far an object or array has been read.
pub(crate) struct Members {
    is_first: bool,
}

/// The name of an object's member.
pub(crate) struct Key<'a> {
    pub(crate) name: Cow<'a, str>,
    /// Where it stands in the file.
    pub(crate) offset: u64,
}

impl<'a> JsonReader<'a> {
    pub(crate) fn new(bytes: &'a [u8], base: usize, what: &'static str) -> Result<Self, CheckpointError> {
        let text = std::str::from_utf8(bytes).map_err(|error| CheckpointError::NotUtf8 {
            place: what.to_owned(),
            offset: (base + error.valid_up_to()) as u64,
        })?;
        Ok(Self { text, position: 0, base, what })
    }

    pub(crate) fn error(&self, why: impl Into<String>) -> CheckpointError {
        CheckpointError::BadJson { place: self.what, offset: self.offset(), why: why.into() }
    }

    fn offset(&self) -> u64 {
        (self.base + self.position) as u64
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.position).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), CheckpointError> {
        self.skip_space();
        if self.peek() != Some(byte) {
            return Err(self.error(format!("{:?} is expected", char::from(byte))));
        }
        self.position += 1;
        Ok(())
    }

    /// Enters an object (`{`) or array (`[`).
    pub(crate) fn begin(&mut self, open: u8) -> Result<Members, CheckpointError> {
        self.expect(open)?;
        Ok(Members { is_first: true })
    }

    /// Moves to the next item; false and past `close` when there is none.
    pub(crate) fn next_item(&mut self, members: &mut Members, close: u8) -> Result<bool, CheckpointError> {
        self.skip_space();
        if self.peek() == Some(close) {
            self.position += 1;
            return Ok(false);
        }
        if !std::mem::replace(&mut members.is_first, false) {
            self.expect(b',')?;
        }
        Ok(true)
    }

    /// The next member of an object, up to its value.
    pub(crate) fn next_key(&mut self, members: &mut Members) -> Result<Option<Key<'a>>, CheckpointError> {
        if !self.next_item(members, b'}')? {
            return Ok(None);
        }
        self.skip_space();
        let offset = self.offset();
        let name = self.name()?;
        self.expect(b':')?;
        Ok(Some(Key { name, offset }))
    }

    /// Confirms that nothing but space follows.
    pub(crate) fn end(&mut self) -> Result<(), CheckpointError> {
        self.skip_space();
        if self.peek().is_some() { Err(self.error("the end is expected")) } else { Ok(()) }
    }

    /// A string of at most 64 KiB.
    pub(crate) fn name(&mut self) -> Result<Cow<'a, str>, CheckpointError> {
        self.skip_space();
        let start = self.offset();
        let place = self.what;
        let too_long = |len: usize| {
            let place = format!("a string in {place}");
            CheckpointError::TooLong { place, offset: start, len: len as u64, limit: MAX_NAME_BYTES }
        };
        let (raw, has_escapes) = self.raw_string()?;
        // An escape takes at most 6 bytes for each byte of the string.
        if raw.len() as u64 > MAX_NAME_BYTES * if has_escapes { 6 } else { 1 } {
            return Err(too_long(raw.len()));
        }
        if !has_escapes {
            return Ok(Cow::Borrowed(raw));
        }
        let Some(name) = unescape(raw) else {
            let why = "a surrogate stands alone in a string".to_owned();
            return Err(CheckpointError::BadJson { place: self.what, offset: start, why });
        };
        if name.len() as u64 > MAX_NAME_BYTES { Err(too_long(name.len())) } else { Ok(Cow::Owned(name)) }
    }

    /// What stands between the quotes, with escapes checked but not resolved, and whether there are any.
    fn raw_string(&mut self) -> Result<(&'a str, bool), CheckpointError> {
        self.expect(b'"')?;
        let start = self.position;
        let mut has_escapes = false;
        loop {
            match self.peek() {
                None => return Err(self.error("the string does not end")),
                Some(b'"') => break,
                Some(b'\\') => {
                    has_escapes = true;
                    self.position += 1;
                    self.skip_escape()?;
                }
                Some(0..0x20) => return Err(self.error("a control character stands in a string")),
                Some(_) => self.position += 1,
            }
        }
        let raw = &self.text[start..self.position];
        self.position += 1;
        Ok((raw, has_escapes))
    }

    /// Skips what follows a backslash.
    fn skip_escape(&mut self) -> Result<(), CheckpointError> {
        let rest = &self.text.as_bytes()[self.position..];
        let len = match rest.first() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 1,
            Some(b'u') if rest.len() > 4 && rest[1..5].iter().all(u8::is_ascii_hexdigit) => 5,
            _ => return Err(self.error("an unknown escape stands in a string")),
        };
        self.position += len;
        Ok(())
    }

    /// A whole number without sign, fraction or exponent.
    pub(crate) fn unsigned(&mut self) -> Result<u64, CheckpointError> {
        self.skip_space();
        let start = self.position;
        self.skip_digits()?;
        if matches!(self.peek(), Some(b'.' | b'e' | b'E')) {
            return Err(self.error("a whole number is expected"));
        }
        let digits = &self.text[start..self.position];
        digits.parse().map_err(|_| self.error("the number does not fit 64 bits"))
    }

    /// Skips digits without leading zeros.
    fn skip_digits(&mut self) -> Result<(), CheckpointError> {
        let start = self.position;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.position += 1;
        }
        match self.text.as_bytes()[start..self.position] {
            [] => Err(self.error("a number is expected")),
            [b'0', _, ..] => Err(self.error("a number has leading zeros")),
            _ => Ok(()),
        }
    }

    /// Skips a string of any length.
    pub(crate) fn skip_string(&mut self) -> Result<(), CheckpointError> {
        self.raw_string().map(|_| ())
    }

    /// Skips a member of an object: its name and a value that is a string.
    pub(crate) fn skip_member(&mut self) -> Result<(), CheckpointError> {
        self.skip_string()?;
        self.expect(b':')?;
        self.skip_string()
    }

    /// Skips any value.
    pub(crate) fn skip_value(&mut self) -> Result<(), CheckpointError> {
        self.skip_nested(0)
    }

    fn skip_nested(&mut self, depth: usize) -> Result<(), CheckpointError> {
        if depth > MAX_SKIPPED_NESTING {
            return Err(self.error(format!("values nest deeper than {MAX_SKIPPED_NESTING}")));
        }
        self.skip_space();
        match self.peek() {
            Some(b'"') => self.skip_string(),
            Some(b'{') => {
                let mut members = self.begin(b'{')?;
                while self.next_item(&mut members, b'}')? {
                    self.skip_string()?;
                    self.expect(b':')?;
                    self.skip_nested(depth + 1)?;
                }
                Ok(())
            }
            Some(b'[') => {
                let mut members = self.begin(b'[')?;
                while self.next_item(&mut members, b']')? {
                    self.skip_nested(depth + 1)?;
                }
                Ok(())
            }
            Some(b'-' | b'0'..=b'9') => self.skip_number(),
            _ => self.skip_word(),
        }
    }

    fn skip_word(&mut self) -> Result<(), CheckpointError> {
        let word =
            ["true", "false", "null"].into_iter().find(|word| self.text[self.position..].starts_with(word));
        self.position += word.ok_or_else(|| self.error("a value is expected"))?.len();
        Ok(())
    }

    fn skip_number(&mut self) -> Result<(), CheckpointError> {
        if self.peek() == Some(b'-') {
            self.position += 1;
        }
        self.skip_digits()?;
        if self.peek() == Some(b'.') {
            self.position += 1;
            self.skip_any_digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.position += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.position += 1;
            }
            self.skip_any_digits()?;
        }
        Ok(())
    }

    fn skip_any_digits(&mut self) -> Result<(), CheckpointError> {
        let start = self.position;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.position += 1;
        }
        if self.position == start { Err(self.error("a digit is expected")) } else { Ok(()) }
    }
}

/// Resolves the escapes of a string whose escapes are well formed; `None` for a lone surrogate.
fn unescape(raw: &str) -> Option<String> {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((before, escape)) = rest.split_once('\\') {
        text.push_str(before);
        let (code, after) = escape.split_at(1);
        rest = after;
        text.push(match code {
            "b" => '\u{8}',
            "f" => '\u{c}',
            "n" => '\n',
            "r" => '\r',
            "t" => '\t',
            "u" => unicode_escape(&mut rest)?,
            other => other.chars().next()?,
        });
    }
    text.push_str(rest);
    Some(text)
}

/// Takes the four hex digits, and the second half of a surrogate pair, from the front of `rest`.
fn unicode_escape(rest: &mut &str) -> Option<char> {
    let high = take_hex(rest)?;
    if !(0xd800..0xdc00).contains(&high) {
        return char::from_u32(high);
    }
    *rest = rest.strip_prefix("\\u")?;
    let low = take_hex(rest)?;
    let low = (0xdc00..0xe000).contains(&low).then_some(low)?;
    char::from_u32(0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00))
}

fn take_hex(rest: &mut &str) -> Option<u32> {
    let (digits, after) = rest.split_at_checked(4)?;
    *rest = after;
    u32::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn skips(text: &str) -> bool {
        let mut reader = JsonReader::new(text.as_bytes(), 0, "test").unwrap();
        reader.skip_value().and_then(|()| reader.end()).is_ok()
    }

    fn string(text: &str) -> Option<String> {
        let mut reader = JsonReader::new(text.as_bytes(), 0, "test").unwrap();
        let name = reader.name().ok()?.into_owned();
        reader.end().ok().map(|()| name)
    }

    #[test]
    fn errors_tell_the_byte() {
        for (text, byte) in [("{\"a\" 1}", 5), ("[1,]", 3), ("[01]", 3), ("\"\u{1}\"", 1), ("{} x", 3)] {
            let mut reader = JsonReader::new(text.as_bytes(), 8, "test").unwrap();
            match reader.skip_value().and_then(|()| reader.end()) {
                Err(CheckpointError::BadJson { offset, .. }) => assert_eq!(offset, byte + 8, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn nesting_has_a_limit() {
        let nested = |n| "[".repeat(n) + &"]".repeat(n);
        assert!(skips(&nested(MAX_SKIPPED_NESTING)) && !skips(&nested(MAX_SKIPPED_NESTING + 2)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn the_same_texts_are_json_as_for_serde(text in "[\\[\\]{}:,\"\\\\a0-9.eE+\\- tnu]{0,12}") {
            prop_assert_eq!(skips(&text), serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok(), "{}", text);
        }

        #[test]
        fn strings_are_the_same_as_for_serde(text in "\"(\\\\[\"/bfnrtux]|\\\\u[dD][89abcd][0-9]{2}|\\\\u00[0-9a-f]{2}|[a\u{e9}\u{1f600}]){0,6}\"") {
            prop_assert_eq!(string(&text), serde_json::from_str::<String>(&text).ok(), "{}", text);
        }
    }
}
