//! Progress of long work on standard error: bars on a terminal, plain lines elsewhere. Never on standard output.

use std::{
    io::IsTerminal as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A plain line is written each time this share of the work is done, in percent.
const PLAIN_STEP_PERCENT: u64 = 20;

/// Where progress goes. Clones share it.
#[derive(Clone, Debug)]
pub struct Progress {
    bars: Option<MultiProgress>,
}

impl Progress {
    /// Bars when standard error is a terminal, lines otherwise.
    pub fn to_stderr() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { bars: terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())) }
    }

    /// One more piece of work, measured in bytes.
    pub fn bytes(&self, label: &str, total: u64) -> Bar {
        let bar = self.bars.as_ref().map(|bars| {
            let style = ProgressStyle::with_template(
                "{prefix:32!} [{bar:30}] {decimal_bytes:>10} / {decimal_total_bytes:<10} {decimal_bytes_per_sec}",
            );
            let style = style.expect("invariant: the template is a constant that parses");
            let bar = bars.add(ProgressBar::new(total).with_style(style.progress_chars("=> ")));
            bar.set_prefix(label.to_owned());
            bar
        });
        Bar { bar, label: label.into(), total, next_percent: Arc::new(AtomicU64::new(PLAIN_STEP_PERCENT)) }
    }

    /// One line, above the bars.
    pub fn line(&self, text: &str) {
        match &self.bars {
            // A failed write to the terminal leaves nothing to tell the user with.
            Some(bars) => drop(bars.println(text)),
            None => eprintln!("{text}"),
        }
    }
}

/// One piece of work. Clones share it.
#[derive(Clone, Debug)]
pub struct Bar {
    bar: Option<ProgressBar>,
    label: String,
    total: u64,
    next_percent: Arc<AtomicU64>,
}

impl Bar {
    /// `done` bytes of the total are done. A bar never goes back.
    pub fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            return bar.set_position(done.min(self.total).max(bar.position()));
        }
        if let Some(line) = plain_line(&self.label, done, self.total, &self.next_percent) {
            eprintln!("{line}");
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn plain_line(label: &str, done: u64, total: u64, next_percent: &AtomicU64) -> Option<String> {
    let percent = done.min(total) * 100 / total.max(1);
    let next = next_percent.load(Ordering::Relaxed);
    if percent < next {
        return None;
    }
    next_percent
        .store(percent / PLAIN_STEP_PERCENT * PLAIN_STEP_PERCENT + PLAIN_STEP_PERCENT, Ordering::Relaxed);
    Some(format!("{label}: {percent} % of {}", megabytes(total)))
}

/// Bytes as decimal megabytes or gigabytes, for people.
pub fn megabytes(bytes: u64) -> String {
    if bytes >= 1_000_000_000 {
        format!("{:.2} GB", bytes as f64 / 1e9)
    } else {
        format!("{:.1} MB", bytes as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_once_a_step() {
        let next = AtomicU64::new(PLAIN_STEP_PERCENT);
        let lines: Vec<String> =
            (0..=1000).filter_map(|done| plain_line("weights", done * 1000, 1_000_000, &next)).collect();
        assert_eq!(lines.len(), 5, "{lines:?}");
        assert_eq!(lines[0], "weights: 20 % of 1.0 MB");
        assert_eq!(lines[4], "weights: 100 % of 1.0 MB");
    }

    #[test]
    fn nothing_to_do_does_not_divide_by_zero() {
        assert_eq!(plain_line("empty", 0, 0, &AtomicU64::new(20)), None);
    }
}
