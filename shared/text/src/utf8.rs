//! Turns bytes that arrive in any pieces into text. It never splits a character and knows nothing of tokens.

/// Bytes of a character that is not complete yet; at most 3.
#[derive(Clone, Debug, Default)]
pub(crate) struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Appends the characters that `bytes` complete to `text`. What can never become a character is replaced by
    /// U+FFFD, one for each maximal part of a character, as the Unicode standard (3.9) recommends.
    pub(crate) fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        let n_pending = loop {
            let chunk = match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(chunk.valid_up_to());
            text.push_str(std::str::from_utf8(valid).expect("invariant: valid up to here"));
            let Some(n_invalid) = chunk.error_len() else {
                break after.len();
            };
            text.push(char::REPLACEMENT_CHARACTER);
            rest = &after[n_invalid..];
        };
        self.pending.drain(..self.pending.len() - n_pending);
    }

    /// Ends the stream: an unfinished character becomes one U+FFFD.
    pub(crate) fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that make valid, broken and cut-off characters likely.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let texts = ["a", "é", "你", "😀", "\u{10ffff}"].map(|text| Just(text.as_bytes().to_vec()));
        let whole = prop::sample::select(vec![0usize, 1, 2, 3, 4]).prop_flat_map(move |i| texts[i].clone());
        let cut = (whole.clone(), 0usize..4).prop_map(|(mut text, n)| {
            text.truncate(n);
            text
        });
        let noise = prop::collection::vec(any::<u8>(), 0..3);
        prop::collection::vec(prop_oneof![4 => whole, 2 => cut, 1 => noise], 0..20)
            .prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn any_pieces_give_the_lossy_whole(bytes in bytes(), cuts in prop::collection::vec(1usize..5, 1..8)) {
            let mut stream = Utf8Stream::default();
            let mut text = String::new();
            let mut rest = bytes.as_slice();
            for n in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at((*n).min(rest.len()));
                stream.push(piece, &mut text);
                prop_assert!(stream.pending.len() <= 3);
                rest = after;
            }
            stream.finish(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_character_waits_for_its_last_byte_and_a_broken_one_does_not() {
        let mut stream = Utf8Stream::default();
        let mut text = String::new();
        stream.push(&[0xf0, 0x9f, 0x98], &mut text);
        assert_eq!(text, "");
        stream.push(&[0x80, 0xe4], &mut text);
        assert_eq!(text, "😀");
        stream.push(b"x", &mut text);
        assert_eq!(text, "😀\u{fffd}x");
        stream.push(&[0xff], &mut text);
        assert_eq!(text, "😀\u{fffd}x\u{fffd}");
    }
}
