//! What a service and the process that started it tell each other.

use std::{fmt, net::SocketAddr};

use clap::Args;
use paceline_telemetry::shutdown::ParentWatch;

/// Flags of every service.
#[derive(Args, Clone, Copy, Debug)]
pub struct ProcessOptions {
    /// Print one JSON object a line on standard output for each event (listening and what the service adds)
    #[arg(long)]
    pub events: bool,
    /// Shut down when standard input is closed, so that the process never outlives its parent
    #[arg(long)]
    pub exit_with_stdin: bool,
}

impl ProcessOptions {
    /// Whether standard input is watched.
    pub fn parent_watch(&self) -> ParentWatch {
        if self.exit_with_stdin { ParentWatch::Stdin } else { ParentWatch::Off }
    }

    /// Says something that happened, a JSON object, if somebody wants to know.
    pub fn event(&self, line: fmt::Arguments<'_>) {
        if self.events {
            println!("{line}");
        }
    }

    /// The service accepts connections.
    pub fn listening(&self, address: SocketAddr) {
        self.event(format_args!("{{\"event\":\"listening\",\"address\":\"{address}\"}}"));
    }
}
