//! What the system takes for writes alone: as many bytes as a step's chunks have, into as many loopback connections, with
//! nothing around them. No server can do with less. It judges nothing.

use std::{
    io::Write as _,
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, Thread},
    time::Duration,
};

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};
use tokio::{io::AsyncReadExt as _, task::JoinSet};

/// Rounds before those that count.
const N_WARM_UP: usize = 64;

/// Rounds of writes, each read by another thread before the next begins.
#[derive(Clone, Copy, Debug)]
pub struct BareWrites {
    /// Connections, each written to once a round.
    pub n_connections: usize,
    /// Bytes of a write.
    pub n_bytes: usize,
    /// Rounds that count.
    pub n_rounds: usize,
}

/// Bytes that were read from all connections, and who waits for them.
struct Read {
    n_bytes: AtomicUsize,
    writer: Thread,
}

impl BareWrites {
    /// Processor time of the writing thread for a round. Readers are tasks of this runtime, as clients are.
    ///
    /// # Errors
    /// When there is no loopback, or a connection breaks.
    pub async fn measure(self) -> anyhow::Result<Duration> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (mut writing, mut reading) = (Vec::new(), Vec::new());
        for _ in 0..self.n_connections {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            writing.push(stream);
            reading.push(listener.accept()?.0);
        }
        let (ready, is_ready) = std::sync::mpsc::channel::<Arc<Read>>();
        let (done, outcome) = tokio::sync::oneshot::channel();
        let writer = thread::Builder::new().name("bare-writes".into()).spawn(move || {
            let read = is_ready.recv().context("nobody reads");
            let _ = done.send(read.and_then(|read| self.write(&mut writing, &read)));
        })?;
        let read = Arc::new(Read { n_bytes: AtomicUsize::new(0), writer: writer.thread().clone() });
        let mut readers = JoinSet::new();
        for stream in reading {
            stream.set_nonblocking(true)?;
            let (stream, read) = (tokio::net::TcpStream::from_std(stream)?, read.clone());
            readers.spawn(self.read(stream, read));
        }
        ready.send(read).context("the writer is gone")?;
        outcome.await.context("the writer is gone")?
    }

    fn write(self, streams: &mut [TcpStream], read: &Read) -> anyhow::Result<Duration> {
        let (bytes, mut total) = (vec![0; self.n_bytes], Duration::ZERO);
        for round in 1..=N_WARM_UP + self.n_rounds {
            let before = thread_time()?;
            for stream in &mut *streams {
                stream.write_all(&bytes)?;
            }
            if round > N_WARM_UP {
                total += thread_time()? - before;
            }
            while read.n_bytes.load(Ordering::Acquire) < round * streams.len() * bytes.len() {
                thread::park();
            }
        }
        Ok(total / self.n_rounds as u32)
    }

    async fn read(self, mut stream: tokio::net::TcpStream, read: Arc<Read>) {
        let (mut buffer, n_round) = (vec![0; 1 << 14], self.n_connections * self.n_bytes);
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            let n_before = read.n_bytes.fetch_add(n, Ordering::AcqRel);
            if (n_before + n) / n_round > n_before / n_round {
                read.writer.unpark();
            }
        }
        // A connection that breaks must not leave the writer waiting.
        read.writer.unpark();
    }
}

/// Processor time of this thread so far.
fn thread_time() -> anyhow::Result<Duration> {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn writes_take_some_time_and_come_to_an_end() {
        let writes = BareWrites { n_connections: 3, n_bytes: 50, n_rounds: 20 };
        let taken = writes.measure().await.expect("loopback");
        assert!(taken > Duration::ZERO);
    }
}
