//! The letters that byte-level BPE writes for bytes (Radford et al. 2019, "Language models are unsupervised multitask
//! learners"): printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.

use std::sync::LazyLock;

const FIRST_STAND_IN: u32 = 0x100;

static LETTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = FIRST_STAND_IN;
    std::array::from_fn(|byte| match byte as u8 {
        byte @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("invariant: at most 68 characters from U+0100 on")
        }
    })
});

/// Bytes of the letters from U+0000 on; `None` where no byte has that letter.
static BYTES: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut bytes = vec![None; LETTERS.iter().map(|letter| *letter as usize + 1).max().unwrap_or(0)];
    for (byte, letter) in (0..=u8::MAX).zip(LETTERS.iter()) {
        bytes[*letter as usize] = Some(byte);
    }
    bytes
});

/// The letter of a byte.
pub(crate) fn letter(byte: u8) -> char {
    LETTERS[byte as usize]
}

/// Appends the bytes that `text` spells. A text with any character that is no letter of a byte stands for itself.
pub(crate) fn append_bytes(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for character in text.chars() {
        match BYTES.get(character as usize).copied().flatten() {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_letter() {
        let text: String = (0..=u8::MAX).map(letter).collect();
        let mut bytes = Vec::new();
        append_bytes(&text, &mut bytes);
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!([letter(b' '), letter(b'\n'), letter(0xad), letter(b'a')], ['Ġ', 'Ċ', '\u{143}', 'a']);
    }
}
