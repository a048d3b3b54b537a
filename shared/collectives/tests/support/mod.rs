//! Runs ranks as processes: the test or benchmark binary starts itself again, once per rank, and passes addresses
//! through standard input and output. It judges nothing.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use paceline_collectives::{AbortFlag, BindSpec, Collective, Endpoint, GroupSpec, Transport, connect};
use paceline_domain::Epoch;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const RANK: &str = "PACELINE_TEST_RANK";
const N_RANKS: &str = "PACELINE_TEST_N_RANKS";
const TRANSPORT: &str = "PACELINE_TEST_TRANSPORT";
const ROLE: &str = "PACELINE_TEST_ROLE";

/// A rank's process, seen from the parent.
pub struct RankProcess {
    /// The process.
    pub child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl RankProcess {
    /// The next line that the process writes; empty at its end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Sends the process a line.
    pub fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        // A process that has ended cannot be killed; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the ranks of a group that play `role`.
pub fn start(n_ranks: usize, transport: Transport, role: &str) -> Vec<RankProcess> {
    let transport = if transport == Transport::Tcp { "tcp" } else { "shared" };
    let mut ranks: Vec<RankProcess> = (0..n_ranks)
        .map(|rank| {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .env(RANK, rank.to_string())
                .env(N_RANKS, n_ranks.to_string())
                .env(TRANSPORT, transport)
                .env(ROLE, role)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let stdin = child.stdin.take().unwrap();
            let stdout = BufReader::new(child.stdout.take().unwrap());
            RankProcess { child, stdin, stdout }
        })
        .collect();
    let addresses: Vec<String> = ranks.iter_mut().map(RankProcess::line).collect();
    for rank in &mut ranks {
        addresses.iter().for_each(|address| rank.say(address));
    }
    ranks
}

/// In a rank's process: its role and its group. `None` in the parent.
pub fn join(deadline: Duration) -> Option<(String, Box<dyn Collective>)> {
    let variable = |name| std::env::var(name).ok();
    let rank: usize = variable(RANK)?.parse().unwrap();
    let n_ranks: usize = variable(N_RANKS)?.parse().unwrap();
    let transport = if variable(TRANSPORT)? == "tcp" { Transport::Tcp } else { Transport::SharedMemory };
    let endpoint = Endpoint::bind(&BindSpec::default()).unwrap();
    println!("{}", endpoint.address());
    let peers = (0..n_ranks).map(|_| wait_for_line().parse().unwrap()).collect();
    let spec = GroupSpec {
        rank,
        epoch: Epoch(1),
        peers,
        secret: [42; 32],
        transport,
        connect_deadline: Duration::from_secs(60),
        deadline,
        abort: AbortFlag::new(),
    };
    Some((variable(ROLE)?, connect(endpoint, &spec).unwrap()))
}

/// In a rank's process: the next line from the parent.
pub fn wait_for_line() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}
