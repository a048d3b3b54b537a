//! Server-sent events out of a stream of bytes. Only the `data` of each event is kept; a line may come in pieces.

use anyhow::ensure;

/// Longest event that is taken, in bytes.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// What has come so far and is not a whole event yet.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: String,
    has_data: bool,
}

impl Events {
    /// Takes bytes; the data of each event that they complete.
    ///
    /// # Errors
    /// An event that is too long or not UTF-8.
    pub fn push(&mut self, bytes: &[u8]) -> anyhow::Result<Vec<String>> {
        let mut events = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                events.extend(self.take_line(line.strip_suffix(b"\r").unwrap_or(&line))?);
            } else {
                let n_bytes = self.line.len() + self.data.len();
                ensure!(n_bytes < MAX_EVENT_BYTES, "an event of more than {MAX_EVENT_BYTES} bytes");
                self.line.push(*byte);
            }
        }
        Ok(events)
    }

    /// An empty line ends an event.
    fn take_line(&mut self, line: &[u8]) -> anyhow::Result<Option<String>> {
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            return Ok(std::mem::take(&mut self.has_data).then_some(data));
        }
        let line = std::str::from_utf8(line)?;
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if field == "data" {
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push('\n');
            }
            self.data.push_str(value.strip_prefix(' ').unwrap_or(value));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": a comment\r\ndata: {\"a\": 1}\r\n\r\nevent: x\ndata:one\ndata: two\n\n\nid: 7\n\ndata\n\ndata: é\n\ndata: rest";

    #[test]
    fn events_are_the_same_however_their_bytes_are_cut() {
        let expected = ["{\"a\": 1}", "one\ntwo", "", "é"];
        for size in 1..STREAM.len() {
            let mut events = Events::default();
            let pieces = STREAM.as_bytes().chunks(size);
            let found: Vec<String> = pieces.flat_map(|piece| events.push(piece).expect("events")).collect();
            assert_eq!(found, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut events = Events::default();
        let endless = vec![b'x'; MAX_EVENT_BYTES];
        events.push(&endless).expect("just fits");
        assert!(events.push(b"x").is_err());
        assert!(Events::default().push(b"data: \xff\n").is_err());
    }
}
