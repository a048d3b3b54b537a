//! What became of the proposals of each source, by their position in a proposal, summed up over requests. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::answer::ProposalsJson;

/// Positions that the table has columns for.
const COLUMNS: usize = 8;

/// Proposed and accepted tokens of every source.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Proposals {
    by_source: BTreeMap<String, Counts>,
}

#[derive(Clone, PartialEq, Debug, Default)]
struct Counts {
    drafts: u64,
    drafted: Vec<u64>,
    accepted: Vec<u64>,
    branches: u64,
    accepted_branches: u64,
}

impl Proposals {
    /// Adds those of one request.
    pub fn add(&mut self, source: &ProposalsJson) {
        let counts = self.by_source.entry(source.source.clone()).or_default();
        counts.drafts += source.drafts;
        add(&mut counts.drafted, &source.draft_tokens_per_pos);
        add(&mut counts.accepted, &source.accepted_tokens_per_pos);
        counts.branches += source.branches;
        counts.accepted_branches += source.accepted_branches;
    }

    /// Adds what another one has.
    pub fn merge(&mut self, other: &Self) {
        for (source, more) in &other.by_source {
            let counts = self.by_source.entry(source.clone()).or_default();
            counts.drafts += more.drafts;
            add(&mut counts.drafted, &more.drafted);
            add(&mut counts.accepted, &more.accepted);
            counts.branches += more.branches;
            counts.accepted_branches += more.accepted_branches;
        }
    }

    /// Proposed tokens.
    pub fn n_drafted(&self) -> u64 {
        self.by_source.values().flat_map(|counts| &counts.drafted).sum()
    }

    /// Tokens of them that were accepted.
    pub fn n_accepted(&self) -> u64 {
        self.by_source.values().flat_map(|counts| &counts.accepted).sum()
    }

    /// Second guesses beside them that were right.
    pub fn n_accepted_branches(&self) -> u64 {
        self.by_source.values().map(|counts| counts.accepted_branches).sum()
    }

    /// One object for each source.
    pub fn json(&self) -> Value {
        let object = |(source, counts): (&String, &Counts)| {
            json!({
                "source": source,
                "drafts": counts.drafts,
                "draft_tokens_per_pos": shortened(&counts.drafted, &counts.drafted),
                "accepted_tokens_per_pos": shortened(&counts.accepted, &counts.drafted),
                "branches": counts.branches,
                "accepted_branches": counts.accepted_branches,
            })
        };
        self.by_source.iter().map(object).collect()
    }

    /// A line for each source: accepted and proposed tokens at each position, then second guesses beside them.
    pub fn rows(&self, (class, batch, mode): (&str, usize, &str)) -> String {
        let row = |(source, counts): (&String, &Counts)| {
            let cell = |accepted: u64, tried: u64| match tried {
                0 => format!("{:>10}", "-"),
                tried => format!("{:>10}", format!("{accepted}/{tried}")),
            };
            let at = |counts: &[u64], position: usize| counts.get(position).copied().unwrap_or(0);
            let positions = (0..COLUMNS)
                .map(|position| cell(at(&counts.accepted, position), at(&counts.drafted, position)));
            let cells: String = positions.chain([cell(counts.accepted_branches, counts.branches)]).collect();
            format!("{class:<13}{batch:>5}  {mode:<6} {source:<7}{cells}\n")
        };
        self.by_source.iter().map(row).collect()
    }
}

/// Above the rows.
pub fn heading() -> String {
    let positions: String = (1..=COLUMNS).map(|position| format!("{position:>10}")).collect();
    format!(
        "\naccepted/proposed tokens by position in a proposal, and second guesses beside them\n\
         class        batch  mode   source {positions}  branches\n"
    )
}

fn add(sums: &mut Vec<u64>, more: &[u64]) {
    sums.resize(sums.len().max(more.len()), 0);
    sums.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
}

/// Up to the last position at which anything was proposed.
fn shortened<'a>(counts: &'a [u64], drafted: &[u64]) -> &'a [u64] {
    let n = drafted.iter().rposition(|n| *n > 0).map_or(0, |last| last + 1);
    &counts[..n.min(counts.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, drafted: &[u64], accepted: &[u64]) -> ProposalsJson {
        ProposalsJson {
            source: name.into(),
            drafts: drafted[0],
            draft_tokens: drafted.iter().sum(),
            accepted_tokens: accepted.iter().sum(),
            accepted_tokens_per_pos: accepted.to_vec(),
            draft_tokens_per_pos: drafted.to_vec(),
            branches: 2,
            accepted_branches: 1,
        }
    }

    #[test]
    fn sources_and_positions_stay_apart() {
        let (mut one, mut other) = (Proposals::default(), Proposals::default());
        one.add(&source("draft", &[4, 2, 0], &[3, 1, 0]));
        one.add(&source("ngram", &[1, 1, 1], &[0, 0, 0]));
        other.add(&source("draft", &[1, 0, 0, 0], &[1, 0, 0, 0]));
        one.merge(&other);
        assert_eq!((one.n_drafted(), one.n_accepted(), one.n_accepted_branches()), (10, 5, 3));
        let expected = json!([
            {"source": "draft", "drafts": 5, "draft_tokens_per_pos": [5, 2], "accepted_tokens_per_pos": [4, 1],
                "branches": 4, "accepted_branches": 2},
            {"source": "ngram", "drafts": 1, "draft_tokens_per_pos": [1, 1, 1], "accepted_tokens_per_pos": [0, 0, 0],
                "branches": 2, "accepted_branches": 1},
        ]);
        assert_eq!(one.json(), expected);
        let rows = one.rows(("code", 4, "auto"));
        let words: Vec<&str> = rows.lines().next().expect("two lines").split_whitespace().collect();
        assert_eq!(words[..7], ["code", "4", "auto", "draft", "4/5", "1/2", "-"]);
        assert_eq!(words[4 + COLUMNS], "2/4");
        assert_eq!(Proposals::default().rows(("code", 1, "off")), "");
    }
}
