//! One service as a child process: its events, the tail of its log, its end. It knows nothing of clusters.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, ChildStdin, Command},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

use crate::event::Event;

/// Log lines kept for error messages.
const TAIL_LINES: usize = 30;
/// Events that may wait to be read.
const EVENT_QUEUE: usize = 256;
/// How long a child gets to write its last words after it ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What to do with a child's log lines beside keeping the last ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Log {
    /// Nothing.
    Keep,
    /// Write them to standard error, each with the service's name.
    Forward,
}

/// How to start a service.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// For messages: "shard 0", "coordinator".
    pub name: String,
    /// The executable.
    pub program: PathBuf,
    /// Its arguments; `--events --exit-with-stdin` are added.
    pub args: Vec<OsString>,
    /// Variables added to the environment.
    pub env: Vec<(String, String)>,
    /// What to do with its log.
    pub log: Log,
}

/// A service that ended when it should not have.
#[derive(thiserror::Error, Clone, Debug)]
#[error("{name} ended ({status}){}{}", shown_restarts(*n_restarts), shown_tail(tail))]
pub struct ServiceEnded {
    /// Which one.
    pub name: String,
    /// How, in words.
    pub status: String,
    /// Its last log lines.
    pub tail: Vec<String>,
    /// How often it was started again before, in vain.
    pub n_restarts: usize,
}

fn shown_restarts(n_restarts: usize) -> String {
    if n_restarts == 0 { String::new() } else { format!(" after it was started again {n_restarts} times") }
}

fn shown_tail(tail: &[String]) -> String {
    if tail.is_empty() {
        return "; it wrote no log".into();
    }
    format!("; the end of its log:\n  {}", tail.join("\n  "))
}

type Tail = Arc<Mutex<VecDeque<String>>>;

/// A running service. Dropped, it is killed; by itself it ends when our end of its standard input closes, so it
/// does not outlive us even when we are killed.
#[derive(Debug)]
pub struct ServiceProcess {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    events: mpsc::Receiver<Event>,
    tail: Tail,
    /// Reads the log to its end.
    log: Option<JoinHandle<()>>,
    /// Until when its last words are waited for, once it has ended.
    last_words_until: Option<Instant>,
}

impl ServiceProcess {
    /// Starts it. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(spec: &ServiceSpec) -> io::Result<Self> {
        let mut command = Command::new(&spec.program);
        command.args(&spec.args).args(["--events", "--exit-with-stdin"]);
        command.envs(spec.env.iter().map(|(key, value)| (key, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Out of the terminal's process group: Ctrl-C is for us, and we stop our children in order.
        command.process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("{} cannot be started: {error}", spec.program.display()))
        })?;
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let tail = Tail::default();
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        if let Some(stdout) = stdout {
            tokio::spawn(read_events(stdout, sender, tail.clone()));
        }
        let prefix = (spec.log == Log::Forward).then(|| spec.name.clone());
        let log = stderr.map(|stderr| tokio::spawn(read_log(stderr, tail.clone(), prefix)));
        Ok(Self { name: spec.name.clone(), child, stdin, events, tail, log, last_words_until: None })
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// The last log lines.
    pub fn log_tail(&self) -> Vec<String> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Waits for the next event. Safe to cancel.
    ///
    /// # Errors
    /// When the service ends instead.
    pub async fn next_event(&mut self) -> Result<Event, ServiceEnded> {
        match self.events.recv().await {
            Some(event) => Ok(event),
            None => Err(self.ended().await),
        }
    }

    /// Waits until the service ends, and tells how. Events that come meanwhile are dropped. Safe to cancel.
    pub async fn ended(&mut self) -> ServiceEnded {
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status,
                Some(_) = self.events.recv() => {}
            }
        };
        // Who inherited its output may hold it open for ever; who inherited its input ends like it.
        self.stdin = None;
        let until = *self.last_words_until.get_or_insert_with(|| Instant::now() + LAST_WORDS);
        let last_words = async {
            while self.events.recv().await.is_some() {}
            if let Some(log) = self.log.as_mut().filter(|log| !log.is_finished()) {
                let _ = log.await;
            }
        };
        let _ = timeout_at(until, last_words).await;
        ServiceEnded {
            name: self.name.clone(),
            status: describe(status),
            tail: self.log_tail(),
            n_restarts: 0,
        }
    }

    /// Asks the service to end and waits for it; kills it when it takes longer than `grace`.
    pub async fn stop(mut self, grace: Duration) {
        self.ask_to_end();
        if timeout(grace, self.ended()).await.is_err() {
            tracing::warn!(service = self.name, "did not end in time and is killed");
            // The only failure is that it has ended after all.
            let _ = self.child.kill().await;
        }
    }

    /// Asks the service to end without waiting.
    pub fn ask_to_end(&mut self) {
        self.stdin = None;
    }

    /// Ends the service at once, as a crash would.
    ///
    /// # Errors
    /// When it has ended already.
    pub async fn kill(&mut self) -> io::Result<()> {
        self.child.kill().await
    }
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("its status is unknown: {error}"),
    }
}

async fn read_events(stdout: impl AsyncRead + Unpin, sender: mpsc::Sender<Event>, tail: Tail) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match Event::from_line(&line) {
            // Nobody listens any more: keep reading so that the service never blocks on its output.
            Some(event) => drop(sender.send(event).await),
            None => remember(&tail, line),
        }
    }
}

async fn read_log(stderr: impl AsyncRead + Unpin, tail: Tail, prefix: Option<String>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(prefix) = &prefix {
            eprintln!("[{prefix}] {line}");
        }
        remember(&tail, line);
    }
}

fn remember(tail: &Tail, line: String) {
    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    if tail.len() == TAIL_LINES {
        tail.pop_front();
    }
    tail.push_back(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ServiceSpec {
        ServiceSpec {
            name: "test".into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: vec![("ANSWER".into(), "42".into())],
            log: Log::Keep,
        }
    }

    #[tokio::test]
    async fn events_come_in_order_and_the_end_shows_the_log() {
        let script =
            r#"echo '{"event":"listening","address":"a:'$ANSWER'"}'; echo not json; echo why >&2; exit 3"#;
        let mut service = ServiceProcess::start(&shell(script)).expect("starts");
        assert_eq!(service.next_event().await.ok(), Some(Event::Listening { address: "a:42".into() }));
        let ended = service.next_event().await.expect_err("it ends").to_string();
        assert!(ended.contains("test ended (exit status: 3)"), "{ended}");
        assert!(ended.contains("why") && ended.contains("not json"), "{ended}");
    }

    #[tokio::test]
    async fn one_whose_own_child_outlives_it_has_ended_however_often_the_wait_is_cancelled() {
        let mut service = ServiceProcess::start(&shell("sleep 600 & echo $! >&2; exit 3")).expect("starts");
        let ended = loop {
            tokio::select! {
                biased;
                ended = service.ended() => break ended,
                () = tokio::task::yield_now() => {}
            }
        };
        assert!(ended.status.contains("exit status: 3"), "{ended}");
        // Its output is open still: this fails when its child has ended.
        let killed = std::process::Command::new("kill").args(&ended.tail).status();
        assert!(killed.is_ok_and(|status| status.success()), "{ended}");
    }

    #[tokio::test]
    async fn closing_its_input_ends_it() {
        let service = ServiceProcess::start(&shell("cat")).expect("starts");
        let pid = service.pid().expect("runs");
        service.stop(Duration::from_secs(30)).await;
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn one_that_does_not_listen_is_killed() {
        let service = ServiceProcess::start(&shell("exec sleep 1000")).expect("starts");
        let pid = service.pid().expect("runs");
        service.stop(Duration::from_millis(50)).await;
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let spec = ServiceSpec { program: "/nowhere/at/all".into(), ..shell("") };
        let error = ServiceProcess::start(&spec).expect_err("cannot start").to_string();
        assert!(error.contains("/nowhere/at/all"), "{error}");
    }
}
