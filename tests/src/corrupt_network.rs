//! `CorruptNetwork`: a test double of the way between two services, a TCP proxy. While it is corrupt it flips bytes, leaves
//! some out and cuts connections, in both directions, as its seed says; while it holds, nothing arrives; else it passes on
//! what it gets.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use crate::random::Random;

/// How often a piece is harmed.
const BADNESS: f64 = 0.05;
/// Most bytes of a piece; a frame is smaller.
const PIECE: usize = 4_096;

/// A way to harm a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Harm {
    /// A bit is another one.
    Flip,
    /// Bytes in it are missing.
    LeaveOut,
    /// It and all that would follow is lost, in both directions.
    Cut,
}

impl Harm {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Flip, Self::LeaveOut, Self::Cut];
}

/// A proxy. Dropped, it ends, and its connections with it.
#[derive(Debug)]
pub struct CorruptNetwork {
    address: String,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    is_corrupt: AtomicBool,
    holds: watch::Sender<bool>,
    n_harmed: [AtomicU64; Harm::ALL.len()],
}

impl CorruptNetwork {
    /// A way to `service`, which is `host:port`; it is well at first.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(seed: u64, service: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(State {
            is_corrupt: AtomicBool::new(false),
            holds: watch::Sender::new(false),
            n_harmed: Default::default(),
        });
        let task = tokio::spawn(accept(listener, service.to_owned(), Random::new(seed), state.clone()));
        Ok(Self { address, state, task })
    }

    /// Where it listens, as a URL.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on it is corrupt.
    pub fn corrupt(&self) {
        self.state.is_corrupt.store(true, Ordering::Relaxed);
    }

    /// From now on nothing arrives, as if the service were stopped.
    pub fn hold(&self) {
        self.state.holds.send_replace(true);
    }

    /// From now on it is well; what was held arrives.
    pub fn repair(&self) {
        self.state.is_corrupt.store(false, Ordering::Relaxed);
        self.state.holds.send_replace(false);
    }

    /// Pieces that were harmed so far, as [`Harm::ALL`].
    pub fn n_harmed(&self) -> [u64; Harm::ALL.len()] {
        Harm::ALL.map(|harm| self.state.n_harmed[harm as usize].load(Ordering::Relaxed))
    }
}

impl Drop for CorruptNetwork {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl State {
    fn harm(&self, random: &mut Random) -> Option<Harm> {
        if !self.is_corrupt.load(Ordering::Relaxed) || !random.happens(BADNESS) {
            return None;
        }
        let harm = *random.pick(&Harm::ALL);
        self.n_harmed[harm as usize].fetch_add(1, Ordering::Relaxed);
        Some(harm)
    }

    /// Until nothing is held.
    async fn passes(&self) {
        let mut holds = self.holds.subscribe();
        holds.wait_for(|holds| !holds).await.expect("invariant: the sender is here");
    }
}

async fn accept(listener: TcpListener, service: String, mut random: Random, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((near, _)) = listener.accept() => {
                let randoms = [(); 2].map(|()| Random::new(random.bits()));
                connections.spawn(connect(near, service.clone(), randoms, state.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Until both ends have closed, or it is cut.
async fn connect(near: TcpStream, service: String, [out, back]: [Random; 2], state: Arc<State>) {
    let Ok(far) = TcpStream::connect(service).await else { return };
    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
    // An error is the end of both directions.
    let _ =
        tokio::try_join!(pump(near_read, far_write, out, &state), pump(far_read, near_write, back, &state));
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut random: Random,
    state: &State,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        let n_bytes = from.read(&mut buffer).await?;
        if n_bytes == 0 {
            return to.shutdown().await;
        }
        state.passes().await;
        let piece = &mut buffer[..n_bytes];
        let mut missing = 0..0;
        match state.harm(&mut random) {
            None => {}
            Some(Harm::Flip) => piece[random.within(0..n_bytes)] ^= 1 << random.within(0..8),
            Some(Harm::LeaveOut) => {
                let start = random.within(0..n_bytes);
                missing = start..random.within(start..n_bytes) + 1;
            }
            Some(Harm::Cut) => return Err(io::ErrorKind::ConnectionAborted.into()),
        }
        to.write_all(&piece[..missing.start]).await?;
        to.write_all(&piece[missing.end..]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A service that sends back what it gets.
    async fn echo() -> io::Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        Ok(address)
    }

    /// Whether the same bytes come back.
    async fn is_whole(network: &CorruptNetwork) -> io::Result<bool> {
        let mut stream = TcpStream::connect(network.address().trim_start_matches("http://")).await?;
        let sent: Vec<u8> = (0..200).collect();
        stream.write_all(&sent).await?;
        let (mut from, mut to) = stream.split();
        to.shutdown().await?;
        let mut received = Vec::new();
        // A connection that is cut may end with an error.
        let _ = from.read_to_end(&mut received).await;
        Ok(received == sent)
    }

    #[tokio::test]
    async fn it_harms_while_it_is_corrupt_and_only_then() -> io::Result<()> {
        let network = CorruptNetwork::start(1, &echo().await?).await?;
        assert!(is_whole(&network).await? && network.n_harmed() == [0; 3]);
        network.corrupt();
        while network.n_harmed().contains(&0) {
            let before = network.n_harmed();
            assert!(!is_whole(&network).await? || before == network.n_harmed());
        }
        network.repair();
        let before = network.n_harmed();
        assert!(is_whole(&network).await?);
        assert_eq!(network.n_harmed(), before);
        Ok(())
    }

    #[tokio::test]
    async fn what_it_holds_arrives_when_it_is_well() -> io::Result<()> {
        let network = CorruptNetwork::start(1, &echo().await?).await?;
        network.hold();
        let mut held = Box::pin(is_whole(&network));
        let waited = tokio::time::timeout(Duration::from_millis(100), &mut held).await;
        assert!(waited.is_err(), "something has arrived");
        network.repair();
        assert!(held.await?);
        Ok(())
    }
}
