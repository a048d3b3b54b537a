//! The way of chunks to one client: a bounded buffer, and what becomes of a client that reads too slowly. It does not
//! know what chunks say.

use std::{collections::VecDeque, future::Future, time::Duration};

use paceline_wire::inference::GenerateResponse;
use tokio::{sync::mpsc, time::timeout};
use tonic::Status;

/// What goes to the client.
type Message = Result<GenerateResponse, Status>;

/// The sending side. There is always room for a last message.
#[derive(Debug)]
pub struct Reader {
    sender: mpsc::Sender<Message>,
    last: Option<mpsc::OwnedPermit<Message>>,
    /// What found no room: no more than steps in flight, and one told with the step that stalled, bring after that.
    backlog: VecDeque<Message>,
}

/// What a chunk met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// It is on its way, or waits behind others.
    Open,
    /// It is the first that found no room: no more should be made until there is some.
    Stalled,
    /// Nobody reads any more.
    Gone,
}

/// What a stalled reader did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// It read, or went away.
    Moves,
    /// Nothing, for as long as it may.
    Stuck,
}

impl Reader {
    /// A buffer of this many chunks, and the client's side of it.
    pub fn new(n_chunks: usize) -> (Self, mpsc::Receiver<Message>) {
        let (sender, receiver) = mpsc::channel(n_chunks.max(1) + 1);
        let last = sender.clone().try_reserve_owned().ok();
        (Self { sender, last, backlog: VecDeque::new() }, receiver)
    }

    /// Whether nobody reads any more.
    pub fn is_gone(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a chunk, or keeps it until there is room.
    pub fn push(&mut self, chunk: GenerateResponse) -> Flow {
        if !self.backlog.is_empty() {
            self.backlog.push_back(Ok(chunk));
            return Flow::Open;
        }
        match self.sender.try_send(Ok(chunk)) {
            Ok(()) => Flow::Open,
            Err(mpsc::error::TrySendError::Closed(_)) => Flow::Gone,
            Err(mpsc::error::TrySendError::Full(message)) => {
                self.backlog.push_back(message);
                Flow::Stalled
            }
        }
    }

    /// Sends what waits, as far as there is room.
    pub fn flush(&mut self) -> Flow {
        while let Some(message) = self.backlog.pop_front() {
            match self.sender.try_send(message) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Closed(_)) => return Flow::Gone,
                Err(mpsc::error::TrySendError::Full(message)) => {
                    self.backlog.push_front(message);
                    return Flow::Stalled;
                }
            }
        }
        Flow::Open
    }

    /// Resolves as soon as there is room or nobody reads, or when nothing was read for `limit`.
    pub fn progress(&self, limit: Duration) -> impl Future<Output = Progress> + Send + use<> {
        let sender = self.sender.clone();
        async move {
            let room = timeout(limit, sender.reserve()).await;
            if room.is_ok() { Progress::Moves } else { Progress::Stuck }
        }
    }

    /// Ends the stream with a message after all that waits. A client that has not read that yet gets `limit` for each
    /// message, on a task of its own.
    pub fn end(mut self, last: Message, limit: Duration) {
        if self.flush() == Flow::Stalled {
            tokio::spawn(self.deliver(last, limit));
        } else {
            self.send_last(last);
        }
    }

    /// Ends the stream at once, without what waits: the client reads nothing.
    pub fn give_up(self, limit: Duration) {
        self.send_last(Err(stuck(limit)));
    }

    async fn deliver(mut self, last: Message, limit: Duration) {
        while let Some(message) = self.backlog.pop_front() {
            match timeout(limit, self.sender.send(message)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => return self.give_up(limit),
            }
        }
        self.send_last(last);
    }

    fn send_last(self, last: Message) {
        if let Some(permit) = self.last {
            permit.send(last);
        }
    }
}

fn stuck(limit: Duration) -> Status {
    Status::aborted(format!(
        "the client read nothing for {} ms while its buffer was full; what followed is lost",
        limit.as_millis()
    ))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn chunk(index: u64) -> GenerateResponse {
        GenerateResponse { index, ..GenerateResponse::default() }
    }

    async fn rest(mut receiver: mpsc::Receiver<Message>) -> Vec<Result<u64, Code>> {
        let mut messages = Vec::new();
        while let Some(message) = receiver.recv().await {
            messages.push(message.map(|chunk| chunk.index).map_err(|status| status.code()));
        }
        messages
    }

    #[tokio::test]
    async fn a_reader_that_keeps_up_gets_everything_in_order() {
        let (mut reader, receiver) = Reader::new(2);
        assert_eq!([0, 1].map(|i| reader.push(chunk(i))), [Flow::Open; 2]);
        reader.end(Ok(chunk(2)), LONG);
        assert_eq!(rest(receiver).await, [Ok(0), Ok(1), Ok(2)]);
    }

    #[tokio::test]
    async fn a_stalled_reader_goes_on_where_it_was() {
        let (mut reader, mut receiver) = Reader::new(2);
        let flows = [0, 1, 2, 3].map(|i| reader.push(chunk(i)));
        assert_eq!(flows, [Flow::Open, Flow::Open, Flow::Stalled, Flow::Open]);
        assert_eq!(reader.flush(), Flow::Stalled);
        let progress = reader.progress(LONG);
        assert!(receiver.recv().await.is_some());
        assert_eq!(progress.await, Progress::Moves);
        assert_eq!(reader.flush(), Flow::Stalled);
        reader.end(Err(Status::deadline_exceeded("late")), LONG);
        assert_eq!(rest(receiver).await, [Ok(1), Ok(2), Ok(3), Err(Code::DeadlineExceeded)]);
    }

    #[tokio::test]
    async fn a_stuck_reader_is_told_so() {
        let (mut reader, receiver) = Reader::new(1);
        assert_eq!([0, 1].map(|i| reader.push(chunk(i))), [Flow::Open, Flow::Stalled]);
        let limit = Duration::from_millis(1);
        assert_eq!(reader.progress(limit).await, Progress::Stuck);
        reader.give_up(limit);
        assert_eq!(rest(receiver).await, [Ok(0), Err(Code::Aborted)]);
    }

    #[tokio::test]
    async fn nobody_is_waited_for_who_is_gone() {
        let (mut reader, receiver) = Reader::new(1);
        assert_eq!([0, 1].map(|i| reader.push(chunk(i))), [Flow::Open, Flow::Stalled]);
        drop(receiver);
        assert!(reader.is_gone());
        assert_eq!(reader.progress(LONG).await, Progress::Moves);
        assert_eq!(reader.flush(), Flow::Gone);
    }
}
