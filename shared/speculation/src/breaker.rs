//! Leaves out a source that is late, dead or talks nonsense, and lets it in again when it is well. Time is an argument.

use std::time::{Duration, Instant};

/// What a source did wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It did not answer in time.
    Late,
    /// It is gone.
    Dead,
    /// It said what cannot be.
    Nonsense,
}

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BreakerConfig {
    /// Times in a row that a source may be late.
    pub max_late: u32,
    /// How long the source is left out after the first fault; twice as long after each further one.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            max_late: 3,
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_millis(1_000),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// In use.
    Closed,
    /// Left out.
    Open { until: Instant },
    /// Asked once, to see whether it is well; and again when nothing came of it.
    Probing { again: Instant },
}

/// One source's breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    config: BreakerConfig,
    state: State,
    n_late: u32,
    pause: Duration,
    n_opened: u64,
}

impl Breaker {
    /// Of a source that is well.
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, state: State::Closed, n_late: 0, pause: config.first_pause, n_opened: 0 }
    }

    /// Whether the source may be asked now. After a pause it may be asked once; what it does then decides.
    pub fn allows(&mut self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Probing { again: until } | State::Open { until } if now < until => false,
            State::Probing { .. } | State::Open { .. } => {
                self.state = State::Probing { again: now + self.pause };
                true
            }
        }
    }

    /// Whether it is in use, without asking.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// How often it has opened.
    pub fn n_opened(&self) -> u64 {
        self.n_opened
    }

    /// The source answered, in time and sensibly.
    pub fn answered(&mut self) {
        self.state = State::Closed;
        self.n_late = 0;
        self.pause = self.config.first_pause;
    }

    /// Another source has taken the place of one that was in use: it is asked once before it is.
    pub fn replaced(&mut self, now: Instant) {
        if self.is_closed() {
            self.state = State::Open { until: now };
        }
    }

    /// The source is gone. Where another one takes its place, that may be asked after the first pause.
    pub fn renewed(&mut self, now: Instant) {
        if let State::Open { until } | State::Probing { again: until } = self.state {
            self.state = State::Open { until: until.min(now + self.config.first_pause) };
        }
    }

    /// The source did something wrong.
    pub fn fault(&mut self, fault: Fault, now: Instant) {
        self.n_late += u32::from(fault == Fault::Late);
        let is_patient = fault == Fault::Late && self.n_late < self.config.max_late;
        match self.state {
            State::Closed if is_patient => {}
            // It is left out already, for instance by a fault of the same moment.
            State::Open { .. } => {}
            State::Closed | State::Probing { .. } => {
                self.state = State::Open { until: now + self.pause };
                self.pause = (self.pause * 2).min(self.config.longest_pause);
                self.n_opened += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BreakerConfig = BreakerConfig {
        max_late: 2,
        first_pause: Duration::from_millis(100),
        longest_pause: Duration::from_millis(300),
    };

    /// Faults and questions by time in milliseconds; what is allowed.
    fn check(events: &[(u64, Event)]) {
        let (mut breaker, start) = (Breaker::new(CONFIG), Instant::now());
        for (i, (at, event)) in events.iter().enumerate() {
            let now = start + Duration::from_millis(*at);
            match event {
                Event::Fault(fault) => breaker.fault(*fault, now),
                Event::Answered => breaker.answered(),
                Event::Renewed => breaker.renewed(now),
                Event::Replaced => breaker.replaced(now),
                Event::Allowed(expected) => assert_eq!(breaker.allows(now), *expected, "event {i} at {at}"),
            }
        }
    }

    #[derive(Clone, Copy)]
    enum Event {
        Fault(Fault),
        Answered,
        Renewed,
        Replaced,
        Allowed(bool),
    }
    use Event::{Allowed, Answered, Fault as Did, Renewed, Replaced};

    #[test]
    fn late_opens_after_a_few_and_the_others_at_once() {
        check(&[(0, Did(Fault::Late)), (0, Allowed(true)), (1, Did(Fault::Late)), (1, Allowed(false))]);
        check(&[(0, Did(Fault::Late)), (1, Answered), (2, Did(Fault::Late)), (2, Allowed(true))]);
        check(&[(0, Did(Fault::Dead)), (0, Allowed(false))]);
        check(&[(0, Did(Fault::Nonsense)), (0, Allowed(false))]);
    }

    #[test]
    fn it_comes_back_by_itself_with_one_question() {
        check(&[
            (0, Did(Fault::Dead)),
            (99, Allowed(false)),
            (100, Allowed(true)),
            (101, Allowed(false)),
            (110, Answered),
            (111, Allowed(true)),
        ]);
    }

    #[test]
    fn pauses_grow_to_a_limit_and_start_small_again() {
        check(&[
            (0, Did(Fault::Dead)),
            (100, Allowed(true)),
            (100, Did(Fault::Dead)),
            (299, Allowed(false)),
            (300, Allowed(true)),
            (300, Did(Fault::Late)),
            (599, Allowed(false)),
            (600, Allowed(true)),
            (600, Did(Fault::Nonsense)),
            (899, Allowed(false)),
            (900, Allowed(true)),
            (901, Answered),
            (902, Did(Fault::Dead)),
            (1_001, Allowed(false)),
            (1_002, Allowed(true)),
        ]);
    }

    #[test]
    fn a_question_that_came_to_nothing_is_asked_again() {
        check(&[(0, Did(Fault::Dead)), (100, Allowed(true)), (299, Allowed(false)), (300, Allowed(true))]);
    }

    #[test]
    fn who_takes_the_place_of_one_that_was_left_out_is_asked_soon() {
        check(&[(0, Renewed), (0, Allowed(true))]);
        let twice = [(0, Did(Fault::Dead)), (100, Allowed(true)), (100, Did(Fault::Dead))];
        let renewed = [(150, Renewed), (249, Allowed(false)), (250, Allowed(true))];
        check(&[twice.as_slice(), &renewed].concat());
        // Pauses go on growing until it answers; being gone again makes none longer.
        let fails = [(250, Did(Fault::Dead)), (500, Renewed), (549, Allowed(false)), (550, Allowed(true))];
        check(&[twice.as_slice(), &renewed, &fails].concat());
        let probing = [(550, Renewed), (649, Allowed(false)), (650, Allowed(true)), (651, Answered)];
        check(&[twice.as_slice(), &renewed, &fails, &probing, &[(651, Allowed(true))]].concat());
        let asked =
            [(0, Replaced), (0, Allowed(true)), (1, Allowed(false)), (2, Answered), (2, Allowed(true))];
        check(&asked);
        check(&[(0, Did(Fault::Dead)), (50, Replaced), (99, Allowed(false)), (100, Allowed(true))]);
    }

    #[test]
    fn a_second_fault_of_the_same_moment_does_not_count_twice() {
        check(&[(0, Did(Fault::Dead)), (0, Did(Fault::Nonsense)), (100, Allowed(true))]);
        let (mut breaker, now) = (Breaker::new(CONFIG), Instant::now());
        breaker.fault(Fault::Dead, now);
        breaker.fault(Fault::Dead, now);
        assert!(breaker.n_opened() == 1 && !breaker.is_closed());
    }
}
