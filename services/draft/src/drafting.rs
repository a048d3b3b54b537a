//! The thread that owns sessions and model. Commands come in, answers go out; between two passes everything that has
//! come is taken in, so drafting never runs on with tokens that are known to be wrong.

use std::{collections::BTreeMap, io, thread, time::Instant};

use paceline_domain::{DraftControl, ErrorKind};
use paceline_model::ModelError;
use paceline_telemetry::context;
use paceline_wire::{draft::ProposalFrame, draft_frames::Malformed, status::status};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{Span, info_span};

use crate::{
    model::DraftModel,
    planner::{Chunk, PassLimits, plan},
    sessions::{Session, Sessions, StreamId},
};

/// Commands that may wait for the thread.
pub const MAX_COMMANDS: usize = 256;
/// Rows of the pass before the first session: as many as a short prompt has.
const WARM_UP_ROWS: usize = 64;
/// Frames that may wait to be sent on one stream; when it is full, proposals are said again later.
pub const MAX_ANSWERS: usize = 64;

/// Where a stream's answers go.
pub type Outbox = mpsc::Sender<Result<ProposalFrame, Status>>;

/// What the thread is told.
#[derive(Debug)]
pub enum Command {
    /// A stream begins.
    Join(StreamId, Outbox),
    /// A frame came.
    Control(StreamId, DraftControl, Vec<Malformed>),
    /// A stream ended.
    Leave(StreamId),
}

/// Starts the thread; it ends when nobody can command it any more, or when the model cannot go on.
///
/// # Errors
/// When the system gives no thread.
pub fn start(
    model: Box<dyn DraftModel>,
    sessions: Sessions,
    limits: PassLimits,
    commands: mpsc::Receiver<Command>,
) -> io::Result<thread::JoinHandle<Result<(), ModelError>>> {
    let drafting = Drafting { model, sessions, limits, outboxes: BTreeMap::new() };
    thread::Builder::new().name("drafting".into()).spawn(move || drafting.run(commands))
}

struct Drafting {
    model: Box<dyn DraftModel>,
    sessions: Sessions,
    limits: PassLimits,
    outboxes: BTreeMap<StreamId, Outbox>,
}

impl Drafting {
    fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Result<(), ModelError> {
        let n_rows = WARM_UP_ROWS.min(self.limits.max_rows).min(self.sessions.n_positions());
        self.model.warm_up(n_rows.max(1))?;
        loop {
            if self.sessions.waiting().is_empty() {
                let Some(command) = commands.blocking_recv() else { return Ok(()) };
                self.obey(command);
            }
            for _ in 0..MAX_COMMANDS {
                let Ok(command) = commands.try_recv() else { break };
                self.obey(command);
            }
            if commands.is_closed() && commands.is_empty() {
                return Ok(());
            }
            let chunks = plan(&mut self.sessions, self.limits);
            if !chunks.is_empty() {
                self.pass(&chunks)?;
            }
            self.answer();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Join(stream, outbox) => {
                self.outboxes.insert(stream, outbox);
            }
            Command::Control(stream, control, malformed) => {
                for Malformed { session, generation, error } in malformed {
                    self.sessions.quarantine((stream, session), generation, &error.0);
                }
                self.sessions.control(stream, control);
                if self.sessions.is_hopeless(stream) {
                    let problem = "too many sessions of this stream sent what cannot be";
                    self.end(stream, status(ErrorKind::Invalid, problem));
                }
            }
            Command::Leave(stream) => {
                self.sessions.leave(stream);
                self.outboxes.remove(&stream);
            }
        }
    }

    fn end(&mut self, stream: StreamId, status: Status) {
        self.sessions.leave(stream);
        if let Some(outbox) = self.outboxes.remove(&stream) {
            // A stream that does not read ends without a word.
            let _ = outbox.try_send(Err(status));
        }
    }

    /// Runs chunks together. When that fails, each alone: a session that fails then goes to quarantine, the others go on.
    /// When none succeeds, it is the model that cannot.
    fn pass(&mut self, chunks: &[Chunk]) -> Result<(), ModelError> {
        let Err(error) = self.attempt(chunks) else { return Ok(()) };
        tracing::warn!(%error, n_chunks = chunks.len(), "a pass failed; its sessions are tried one by one");
        let mut n_done = 0;
        for chunk in chunks {
            match self.attempt(std::slice::from_ref(chunk)) {
                Ok(()) => n_done += 1,
                Err(error) if error.kind() == ErrorKind::Invalid => {
                    self.sessions.quarantine(chunk.key, u32::MAX, &error.to_string());
                    n_done += 1;
                }
                Err(error) => tracing::warn!(%error, session = chunk.key.1, "a session's pass failed"),
            }
        }
        if n_done == 0 { Err(error) } else { Ok(()) }
    }

    fn attempt(&mut self, chunks: &[Chunk]) -> Result<(), ModelError> {
        let (_pass, start) = (self.span(chunks).entered(), Instant::now());
        let drafted = self.model.run(chunks, &self.sessions)?;
        let elapsed_us = start.elapsed().as_micros() as u64;
        let n_rows: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        for chunk in chunks {
            let share_us = elapsed_us * chunk.tokens.len() as u64 / n_rows.max(1) as u64;
            self.sessions.took(chunk.key, u32::try_from(share_us).unwrap_or(u32::MAX));
        }
        chunks.iter().for_each(|chunk| self.sessions.computed(chunk.key, chunk.end()));
        let last = chunks.iter().filter(|chunk| chunk.is_last);
        for (chunk, drafted) in last.zip(drafted) {
            self.sessions.drafted(chunk.key, drafted);
        }
        Ok(())
    }

    /// Child of the span of the first request that is traced, linked to the others'; none when none is. Numbers are signed
    /// because OTLP has no unsigned ones.
    fn span(&self, chunks: &[Chunk]) -> Span {
        let sessions = chunks.iter().filter_map(|chunk| self.sessions.get(chunk.key));
        let mut traces = sessions.map(Session::trace).filter(|(traceparent, _)| !traceparent.is_empty());
        let Some(first) = traces.next() else { return Span::none() };
        let span = info_span!(
            "forward",
            n_rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum::<usize>() as i64,
            n_sequences = chunks.len() as i64,
            n_drafted = chunks.iter().filter(|chunk| chunk.is_last).count() as i64,
        );
        context::adopt_headers(&span, &first.0, &first.1);
        traces.for_each(|trace| context::link_headers(&span, &trace.0, &trace.1));
        span
    }

    fn answer(&mut self) {
        for (stream, answer) in self.sessions.take_answers() {
            let Some(outbox) = self.outboxes.get(&stream) else { continue };
            match outbox.try_send(Ok((&answer).into())) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(_)) => self.sessions.unsaid(stream, answer),
                Err(mpsc::error::TrySendError::Closed(_)) => {
                    self.sessions.leave(stream);
                    self.outboxes.remove(&stream);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{choice::Drafted, sessions::Limits};

    /// Notes how many rows it is warmed up with.
    struct Recorder(Arc<Mutex<Vec<usize>>>);

    impl DraftModel for Recorder {
        fn run(&mut self, _: &[Chunk], _: &Sessions) -> Result<Vec<Drafted>, ModelError> {
            unreachable!("nobody asks for tokens")
        }

        fn warm_up(&mut self, n_rows: usize) -> Result<(), ModelError> {
            self.0.lock().expect("no panic").push(n_rows);
            Ok(())
        }
    }

    #[test]
    fn the_model_is_warmed_up_once_with_what_it_has_room_for() {
        let limits = [(512, 100, 100, 64), (8, 100, 100, 8), (512, 2, 100, 32), (512, 100, 20, 20)];
        for (max_rows, n_kv_blocks, context, expected) in limits {
            let rows = Arc::new(Mutex::new(Vec::new()));
            let limits = Limits { max_sessions: 1, context, n_vocab: 10, max_ahead: 2, n_kv_blocks };
            let (commands, queue) = mpsc::channel(1);
            let pass = PassLimits { max_rows, prompt_rows: 4 };
            let model = Box::new(Recorder(Arc::clone(&rows)));
            let thread = start(model, Sessions::new(limits), pass, queue).expect("a thread");
            drop(commands);
            thread.join().expect("no panic").expect("nothing fails");
            assert_eq!(*rows.lock().expect("no panic"), [expected]);
        }
    }
}
