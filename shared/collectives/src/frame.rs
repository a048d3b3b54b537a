//! Frames of the TCP transport: header, checksum, and how far a message has come in either direction on a socket
//! that never blocks. It does not know about several peers at once.
//!
//! A message is cut into frames of at most [`FRAME_BYTES`]; an empty message is one empty frame. Each frame carries
//! a keyed BLAKE3 checksum over header and payload, so a frame that was changed, comes from somebody without the
//! secret, or belongs to another epoch is refused. Frames are not encrypted.

use crate::collective::{MAX_GATHER_BYTES, OpKind};
use crate::error::CollectiveError;
use paceline_domain::Epoch;
use std::io::{self, IoSlice, Read, Write};

/// Payload of a full frame.
pub(crate) const FRAME_BYTES: usize = 256 << 10;
/// Magic, kind, from, payload bytes, epoch, sequence, message bytes, offset; then the checksum.
pub(crate) const HEADER_BYTES: usize = CHECKED_BYTES + 16;
const CHECKED_BYTES: usize = 4 * 4 + 4 * 8;
const MAGIC: u32 = u32::from_le_bytes(*b"PLF1");

/// What a message is part of; the same for all its frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Message {
    pub(crate) kind: OpKind,
    pub(crate) from: usize,
    pub(crate) epoch: Epoch,
    /// Number of the operation in its epoch.
    pub(crate) sequence: u64,
}

/// Makes and checks checksums. Every rank of a group derives the same key.
#[derive(Clone)]
pub(crate) struct FrameKey([u8; 32]);

impl FrameKey {
    pub(crate) fn new(secret: &[u8; 32], epoch: Epoch) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("paceline collectives frames");
        hasher.update(secret).update(&epoch.0.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    fn checksum(&self, header: &[u8], payload: &[u8]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(header).update(payload);
        let hash = hasher.finalize();
        std::array::from_fn(|i| hash.as_bytes()[i])
    }
}

impl Message {
    fn header(&self, n_bytes: usize, total: usize, offset: usize) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let words = [MAGIC, self.kind as u32, self.from as u32, n_bytes as u32];
        for (i, word) in words.into_iter().enumerate() {
            header[4 * i..][..4].copy_from_slice(&word.to_le_bytes());
        }
        for (i, word) in [self.epoch.0, self.sequence, total as u64, offset as u64].into_iter().enumerate() {
            header[16 + 8 * i..][..8].copy_from_slice(&word.to_le_bytes());
        }
        header
    }
}

/// A message to send, with the headers of its frames as far as they were needed. All receivers share it.
pub(crate) struct Outgoing<'a> {
    message: Message,
    key: &'a FrameKey,
    payload: &'a [u8],
    headers: Vec<[u8; HEADER_BYTES]>,
}

/// How far one receiver has got.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct SendProgress {
    frame: usize,
    n_sent: usize,
}

impl<'a> Outgoing<'a> {
    pub(crate) fn new(message: Message, key: &'a FrameKey, payload: &'a [u8]) -> Self {
        Self { message, key, payload, headers: Vec::new() }
    }

    fn n_frames(&self) -> usize {
        self.payload.len().div_ceil(FRAME_BYTES).max(1)
    }

    pub(crate) fn is_sent(&self, progress: SendProgress) -> bool {
        progress.frame == self.n_frames()
    }

    /// Writes what the socket takes; returns how much that was.
    pub(crate) fn send(&mut self, socket: &mut impl Write, progress: &mut SendProgress) -> io::Result<usize> {
        let start = progress.frame * FRAME_BYTES;
        let payload = &self.payload[start..self.payload.len().min(start + FRAME_BYTES)];
        if progress.frame == self.headers.len() {
            let mut header = self.message.header(payload.len(), self.payload.len(), start);
            let checksum = self.key.checksum(&header[..CHECKED_BYTES], payload);
            header[CHECKED_BYTES..].copy_from_slice(&checksum);
            self.headers.push(header);
        }
        let header = &self.headers[progress.frame][progress.n_sent.min(HEADER_BYTES)..];
        let rest = &payload[progress.n_sent.saturating_sub(HEADER_BYTES)..];
        let n = socket.write_vectored(&[IoSlice::new(header), IoSlice::new(rest)])?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        progress.n_sent += n;
        if progress.n_sent == HEADER_BYTES + payload.len() {
            *progress = SendProgress { frame: progress.frame + 1, n_sent: 0 };
        }
        Ok(n)
    }
}

/// A message being received. Its memory is kept from one message to the next.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// f32 for their alignment.
    floats: Vec<f32>,
    header: [u8; HEADER_BYTES],
    /// Bytes of the current frame that have come, header included.
    n_read: usize,
    /// Payload bytes of whole frames.
    n_done: usize,
    total: usize,
    is_done: bool,
}

impl Default for Incoming {
    fn default() -> Self {
        let header = [0; HEADER_BYTES];
        Self { floats: Vec::new(), header, n_read: 0, n_done: 0, total: 0, is_done: false }
    }
}

/// Why a message does not come any further.
#[derive(Debug)]
pub(crate) enum ReceiveError {
    /// Nothing now, or the connection ended.
    Io(io::Error),
    /// What came is wrong.
    Refused(CollectiveError),
}

/// What the receiver knows before the first byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    pub(crate) message: Message,
    /// The message's size, if it can be known.
    pub(crate) total: Option<usize>,
}

impl Incoming {
    /// Forgets the last message.
    pub(crate) fn begin(&mut self) {
        (self.n_read, self.n_done, self.total, self.is_done) = (0, 0, 0, false);
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_done
    }

    /// The message; whole once `is_done`.
    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.floats)[..self.n_done]
    }

    /// The message as numbers.
    pub(crate) fn floats(&self) -> &[f32] {
        &self.floats[..self.n_done / size_of::<f32>()]
    }

    /// Reads what the socket has, up to the end of the frame; returns how much that was.
    pub(crate) fn receive(
        &mut self,
        socket: &mut impl Read,
        expected: &Expected,
        key: &FrameKey,
    ) -> Result<usize, ReceiveError> {
        let n = if self.n_read < HEADER_BYTES {
            let n = read(socket, &mut self.header[self.n_read..])?;
            self.n_read += n;
            if self.n_read == HEADER_BYTES {
                self.check_header(expected).map_err(ReceiveError::Refused)?;
                let n_floats = (self.n_done + self.payload_bytes()).div_ceil(size_of::<f32>());
                if self.floats.len() < n_floats {
                    self.floats.resize(n_floats, 0.0);
                }
            }
            n
        } else {
            let frame = self.n_done..self.n_done + self.payload_bytes();
            let frame = &mut bytemuck::cast_slice_mut(&mut self.floats)[frame];
            let n = read(socket, &mut frame[self.n_read - HEADER_BYTES..])?;
            self.n_read += n;
            n
        };
        if self.n_read >= HEADER_BYTES && self.n_read == HEADER_BYTES + self.payload_bytes() {
            self.finish_frame(expected, key).map_err(ReceiveError::Refused)?;
        }
        Ok(n)
    }

    fn payload_bytes(&self) -> usize {
        self.word(12) as usize
    }

    fn word(&self, offset: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.header[offset + i]))
    }

    fn long(&self, offset: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|i| self.header[offset + i]))
    }

    /// Refuses what does not belong here before its payload is read. The checksum comes later: until then the header
    /// can cause no more than one frame of memory.
    fn check_header(&mut self, expected: &Expected) -> Result<(), CollectiveError> {
        let Message { kind, from: rank, epoch, sequence } = expected.message;
        let mismatch = |what| Err(CollectiveError::Mismatch { rank, what });
        if self.word(0) != MAGIC {
            return mismatch("it sent something that is no frame".to_owned());
        }
        let theirs = Epoch(self.long(16));
        if theirs != epoch {
            return Err(CollectiveError::Epoch { rank, theirs, ours: epoch });
        }
        let (their_kind, their_sequence) = (self.word(4), self.long(24));
        if their_kind != kind as u32 || their_sequence != sequence || self.word(8) as usize != rank {
            return mismatch(format!(
                "it is at operation {their_sequence}, {}, this rank at operation {sequence}, {}",
                OpKind::name_of(their_kind),
                kind.name()
            ));
        }
        let (n_bytes, total, offset) = (u64::from(self.word(12)), self.long(32), self.long(40));
        let expected_total = if self.n_done > 0 { Some(self.total) } else { expected.total };
        if total > MAX_GATHER_BYTES as u64 && expected.total.is_none()
            || expected_total.is_some_and(|expected| total != expected as u64)
        {
            return mismatch(format!("it sends {total} bytes, this rank expected {expected_total:?}"));
        }
        if offset != self.n_done as u64 || n_bytes != (total - offset.min(total)).min(FRAME_BYTES as u64) {
            return mismatch(format!("it sends {n_bytes} bytes at {offset} of {total}"));
        }
        self.total = total as usize;
        Ok(())
    }

    fn finish_frame(&mut self, expected: &Expected, key: &FrameKey) -> Result<(), CollectiveError> {
        let n_bytes = self.payload_bytes();
        let payload = &bytemuck::cast_slice(&self.floats)[self.n_done..self.n_done + n_bytes];
        let (header, checksum) = self.header.split_at(CHECKED_BYTES);
        if key.checksum(header, payload) != checksum {
            return Err(CollectiveError::Corrupt { rank: expected.message.from, n_bytes });
        }
        self.n_done += n_bytes;
        self.n_read = 0;
        self.is_done = self.n_done == self.total;
        Ok(())
    }
}

fn read(socket: &mut impl Read, space: &mut [u8]) -> Result<usize, ReceiveError> {
    match socket.read(space) {
        Ok(0) => Err(ReceiveError::Io(io::ErrorKind::UnexpectedEof.into())),
        Ok(n) => Ok(n),
        Err(error) => Err(ReceiveError::Io(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: Message = Message { kind: OpKind::Gather, from: 3, epoch: Epoch(5), sequence: 8 };

    fn frames(message: Message, payload: &[u8], secret: u8) -> Vec<u8> {
        let key = FrameKey::new(&[secret; 32], message.epoch);
        let mut outgoing = Outgoing::new(message, &key, payload);
        let (mut wire, mut progress) = (Vec::new(), SendProgress::default());
        while !outgoing.is_sent(progress) {
            outgoing.send(&mut wire, &mut progress).unwrap();
        }
        wire
    }

    /// Receives from a wire that gives a few bytes at a time.
    fn take(wire: &[u8], total: Option<usize>) -> Result<Vec<u8>, ReceiveError> {
        struct Drip<'a>(&'a [u8]);
        impl Read for Drip<'_> {
            fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
                let n = space.len().min(50_001);
                self.0.read(&mut space[..n])
            }
        }
        let key = FrameKey::new(&[1; 32], MESSAGE.epoch);
        let mut socket = Drip(wire);
        let mut incoming = Incoming::default();
        while !incoming.is_done() {
            incoming.receive(&mut socket, &Expected { message: MESSAGE, total }, &key)?;
        }
        assert_eq!(socket.0.len(), 0, "bytes of the next message were touched or left");
        Ok(incoming.bytes().to_vec())
    }

    fn refusal(wire: &[u8], total: Option<usize>) -> CollectiveError {
        match take(wire, total) {
            Err(ReceiveError::Refused(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_of_any_size_arrive() {
        for n in [0, 1, 3, 4, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES + 7] {
            let payload: Vec<u8> = (0..n).map(|i| (i * 7 + i / 999) as u8).collect();
            let wire = frames(MESSAGE, &payload, 1);
            assert_eq!(take(&wire, None).unwrap(), payload);
            assert_eq!(take(&wire, Some(n)).unwrap(), payload);
            assert!(matches!(refusal(&wire, Some(n + 1)), CollectiveError::Mismatch { rank: 3, .. }));
        }
    }

    #[test]
    fn a_changed_bit_is_found() {
        let wire = frames(MESSAGE, &[9; 100], 1);
        for byte in 0..wire.len() {
            let mut wire = wire.clone();
            wire[byte] ^= 4;
            let error = refusal(&wire, Some(100));
            let is_in_checked_part = byte >= CHECKED_BYTES;
            assert_eq!(
                matches!(error, CollectiveError::Corrupt { rank: 3, .. }),
                is_in_checked_part,
                "{byte}"
            );
        }
    }

    #[test]
    fn frames_of_another_life_or_secret_are_refused() {
        let of = |message| refusal(&frames(message, b"abc", 1), None);
        assert!(matches!(
            of(Message { epoch: Epoch(4), ..MESSAGE }),
            CollectiveError::Epoch { rank: 3, theirs: Epoch(4), ours: Epoch(5) }
        ));
        for message in [
            Message { sequence: 7, ..MESSAGE },
            Message { kind: OpKind::Reduce, ..MESSAGE },
            Message { from: 2, ..MESSAGE },
        ] {
            assert!(matches!(of(message), CollectiveError::Mismatch { rank: 3, .. }));
        }
        assert!(matches!(refusal(&frames(MESSAGE, b"abc", 2), None), CollectiveError::Corrupt { .. }));
    }

    #[test]
    fn a_size_beyond_reason_costs_no_memory() {
        let header = MESSAGE.header(FRAME_BYTES, usize::MAX, 0);
        assert!(matches!(refusal(&header, None), CollectiveError::Mismatch { .. }));
        let header = MESSAGE.header(FRAME_BYTES + 1, FRAME_BYTES + 1, 0);
        assert!(matches!(refusal(&header, None), CollectiveError::Mismatch { .. }));
    }
}
