//! Until when requests are wanted. It is told the time and does not end anything itself.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use paceline_domain::RequestId;

/// Deadlines of live requests; most have none.
#[derive(Debug, Default)]
pub struct Deadlines {
    in_order: BTreeSet<(Instant, RequestId)>,
    by_request: HashMap<RequestId, Instant>,
}

impl Deadlines {
    /// A request is wanted until then.
    pub fn set(&mut self, id: RequestId, deadline: Instant) {
        self.remove(id);
        self.in_order.insert((deadline, id));
        self.by_request.insert(id, deadline);
    }

    /// A request ended, or is somebody else's now; its deadline, if it has one.
    pub fn remove(&mut self, id: RequestId) -> Option<Instant> {
        let deadline = self.by_request.remove(&id)?;
        self.in_order.remove(&(deadline, id));
        Some(deadline)
    }

    /// The nearest.
    pub fn next(&self) -> Option<Instant> {
        self.in_order.first().map(|(deadline, _)| *deadline)
    }

    /// Requests that nobody wants any more, until they are removed.
    pub fn expired(&self, now: Instant) -> Vec<RequestId> {
        self.in_order.iter().take_while(|(deadline, _)| *deadline <= now).map(|(_, id)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_expired_are_those_whose_time_has_come() {
        let start = Instant::now();
        let at = |n_seconds| start + Duration::from_secs(n_seconds);
        let [a, b, c] = [1, 2, 3].map(RequestId);
        let mut deadlines = Deadlines::default();
        deadlines.set(a, at(9));
        deadlines.set(b, at(5));
        deadlines.set(c, at(5));
        deadlines.set(a, at(7));
        assert_eq!(deadlines.next(), Some(at(5)));
        assert_eq!(deadlines.expired(at(4)), []);
        assert_eq!(deadlines.expired(at(5)), [b, c]);
        assert_eq!(deadlines.expired(at(7)), [b, c, a]);
        let removed = [a, c, c].map(|id| deadlines.remove(id));
        assert_eq!(removed, [Some(at(7)), Some(at(5)), None]);
        assert_eq!(deadlines.expired(at(8)), [b]);
        deadlines.remove(b);
        assert_eq!((deadlines.next(), deadlines.by_request.len()), (None, 0));
    }
}
