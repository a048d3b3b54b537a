//! One client's stream: what all choices of its request say, as one row of numbered chunks, and what the request holds
//! while one of them is open. It does not make what they say.

use std::time::Duration;

use paceline_domain::SequenceId;
use paceline_telemetry::context;
use paceline_wire::inference::{GenerateResponse, generate_response::Event};
use tonic::Status;
use tracing::Span;

use crate::{
    admission::Place,
    groups::Route,
    reader::{Flow, Progress, Reader},
};

/// The sending side of one request.
#[derive(Debug)]
pub struct Client {
    reader: Reader,
    next_index: u64,
    _place: Place,
    route: Route,
    span: Span,
    /// Whether somebody will see the span.
    is_traced: bool,
    /// Choices that go on.
    open: Vec<SequenceId>,
    /// Tokens of those that are over.
    n_completion: u64,
}

impl Client {
    /// Nothing was said yet and no choice is open.
    pub fn new(reader: Reader, place: Place, route: Route, span: Span) -> Self {
        let (is_traced, open, n_completion) = (context::is_sampled(&span), Vec::new(), 0);
        Self { reader, next_index: 0, _place: place, route, span, is_traced, open, n_completion }
    }

    /// One more choice.
    pub fn opens(&mut self, id: SequenceId) {
        self.open.push(id);
    }

    /// A choice is over, with so many tokens; whether it was the last.
    pub fn closes(&mut self, id: SequenceId, n_tokens: u32) -> bool {
        self.open.retain(|open| *open != id);
        self.n_completion += u64::from(n_tokens);
        self.open.is_empty()
    }

    /// Choices that go on.
    pub fn open(&self) -> &[SequenceId] {
        &self.open
    }

    /// Tokens of the choices that are over.
    pub fn n_completion(&self) -> u64 {
        self.n_completion
    }

    /// The request's span.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Whether its trace is sampled: others cost nothing in a step.
    pub fn is_traced(&self) -> bool {
        self.is_traced
    }

    /// Whether nobody reads any more.
    pub fn is_gone(&self) -> bool {
        self.reader.is_gone()
    }

    /// As [`Route::elsewhere`].
    pub fn reroute(&mut self) -> Option<usize> {
        self.route.elsewhere()
    }

    /// Sends what a choice says, or keeps it until there is room.
    pub fn push(&mut self, choice: u32, event: Event) -> Flow {
        let chunk = self.chunk(choice, event);
        self.reader.push(chunk)
    }

    /// As [`Reader::flush`].
    pub fn flush(&mut self) -> Flow {
        self.reader.flush()
    }

    /// As [`Reader::progress`].
    pub fn progress(&self, limit: Duration) -> impl Future<Output = Progress> + Send + use<> {
        self.reader.progress(limit)
    }

    /// Ends the stream with the last that a choice says.
    pub fn end(mut self, choice: u32, event: Event, limit: Duration) {
        let chunk = self.chunk(choice, event);
        self.reader.end(Ok(chunk), limit);
    }

    /// Ends the stream with an error.
    pub fn fail(self, status: Status, limit: Duration) {
        self.reader.end(Err(status), limit);
    }

    /// As [`Reader::give_up`].
    pub fn give_up(self, limit: Duration) {
        self.reader.give_up(limit);
    }

    fn chunk(&mut self, choice: u32, event: Event) -> GenerateResponse {
        let index = self.next_index;
        self.next_index += 1;
        GenerateResponse { index, choice, event: Some(event) }
    }
}
