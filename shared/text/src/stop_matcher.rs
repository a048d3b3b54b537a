//! Finds stop strings in streamed text. It does not end a generation: it only says where the text ends.
//!
//! A trie of the stop strings with failure links (Aho and Corasick, 1975) is walked byte by byte. The depth of
//! the state is the length of the longest tail of the text that begins a stop string: exactly what must be
//! held back.

/// What may be shown after more text was pushed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StopOutput {
    /// Text that no stop string can reach any more; without the stop string itself.
    pub text: String,
    /// The stop string that was found, by its index. Nothing follows it.
    pub matched: Option<usize>,
}

/// Streaming search for several stop strings, across the borders of the pieces.
///
/// The match that is complete first wins; of those that end at the same byte the one that starts earliest (the
/// longest), and of equal strings the one with the lowest index. So the result depends on the text alone, not on
/// how it was cut, and no text after the match is ever needed. Empty stop strings never match.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    nodes: Vec<Node>,
    lengths: Vec<usize>,
    state: usize,
    held: String,
    matched: Option<usize>,
}

/// A prefix of some stop string.
#[derive(Clone, Debug, Default)]
struct Node {
    /// Few: at most one for each stop string.
    children: Vec<(u8, usize)>,
    /// The longest proper tail of this prefix that is a prefix too.
    fail: usize,
    depth: usize,
    /// The longest stop string that ends here.
    found: Option<usize>,
}

impl Node {
    fn child(&self, byte: u8) -> Option<usize> {
        self.children.iter().find(|(edge, _)| *edge == byte).map(|(_, child)| *child)
    }
}

impl StopMatcher {
    /// A matcher at the start of a text.
    pub fn new(stop_strings: Vec<String>) -> Self {
        let mut nodes = vec![Node::default()];
        for (index, stop_string) in stop_strings.iter().enumerate().filter(|(_, string)| !string.is_empty()) {
            let end = insert(&mut nodes, stop_string.as_bytes());
            nodes[end].found.get_or_insert(index);
        }
        link(&mut nodes);
        let lengths = stop_strings.iter().map(String::len).collect();
        Self { nodes, lengths, state: 0, held: String::new(), matched: None }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.matched.is_some() {
            return StopOutput { text: String::new(), matched: self.matched };
        }
        // Nothing to find: the root is alone.
        if self.nodes.len() == 1 {
            return StopOutput { text: text.to_owned(), matched: None };
        }
        let n_before = self.held.len();
        self.held.push_str(text);
        for (byte_idx, byte) in text.bytes().enumerate() {
            self.state = self.next(byte);
            if let Some(index) = self.nodes[self.state].found {
                self.held.truncate(n_before + byte_idx + 1 - self.lengths[index]);
                self.matched = Some(index);
                return StopOutput { text: std::mem::take(&mut self.held), matched: self.matched };
            }
        }
        let tail = self.held.split_off(self.held.len() - self.nodes[self.state].depth);
        StopOutput { text: std::mem::replace(&mut self.held, tail), matched: None }
    }

    /// The text still held back, when no more will come.
    pub fn finish(&mut self) -> String {
        self.state = 0;
        std::mem::take(&mut self.held)
    }

    fn next(&self, byte: u8) -> usize {
        step(&self.nodes, self.state, byte)
    }
}

fn step(nodes: &[Node], mut state: usize, byte: u8) -> usize {
    loop {
        match nodes[state].child(byte) {
            Some(child) => return child,
            None if state == 0 => return 0,
            None => state = nodes[state].fail,
        }
    }
}

/// Adds the path of one stop string and gives its last node.
fn insert(nodes: &mut Vec<Node>, stop_string: &[u8]) -> usize {
    let mut state = 0;
    for (depth, byte) in stop_string.iter().enumerate() {
        state = nodes[state].child(*byte).unwrap_or_else(|| {
            nodes.push(Node { depth: depth + 1, ..Node::default() });
            let child = nodes.len() - 1;
            nodes[state].children.push((*byte, child));
            child
        });
    }
    state
}

/// Sets failure links breadth first, so that shorter prefixes are complete before longer ones.
fn link(nodes: &mut [Node]) {
    let mut queue = std::collections::VecDeque::from([0]);
    while let Some(parent) = queue.pop_front() {
        for (byte, child) in nodes[parent].children.clone() {
            let fail = if parent == 0 { 0 } else { step(nodes, nodes[parent].fail, byte) };
            nodes[child].fail = fail;
            nodes[child].found = nodes[child].found.or(nodes[fail].found);
            queue.push_back(child);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: the smallest end, then the smallest start, then the smallest index.
    fn naive(text: &str, stops: &[String]) -> Option<(usize, usize)> {
        let mut matches = Vec::new();
        for (index, stop) in stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty()) {
            for start in 0..text.len() {
                if text.as_bytes()[start..].starts_with(stop.as_bytes()) {
                    matches.push((start + stop.len(), start, index));
                }
            }
        }
        matches.into_iter().min().map(|(_, start, index)| (start, index))
    }

    /// How much of the text must stay back: the longest tail that begins a stop string.
    fn naive_held(text: &str, stops: &[String]) -> usize {
        let begins = |tail: &str| stops.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail));
        let starts = text.char_indices().map(|(start, _)| start);
        starts.map(|start| &text[start..]).find(|tail| begins(tail)).map_or(0, str::len)
    }

    fn strings(items: &[&str]) -> Vec<String> {
        items.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_match_across_pieces_is_cut_out() {
        let mut matcher = StopMatcher::new(strings(&["\n\nUser:", "END"]));
        assert_eq!(matcher.push("Hello\n"), StopOutput { text: "Hello".into(), matched: None });
        assert_eq!(matcher.push("\nUs"), StopOutput::default());
        assert_eq!(
            matcher.push("age\n\nUser: no"),
            StopOutput { text: "\n\nUsage".into(), matched: Some(0) }
        );
        assert_eq!(matcher.push("more"), StopOutput { text: String::new(), matched: Some(0) });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn what_is_held_back_comes_at_the_end() {
        let mut matcher = StopMatcher::new(strings(&["</s>"]));
        assert_eq!(matcher.push("a </").text, "a ");
        assert_eq!(matcher.finish(), "</");
    }

    #[test]
    fn the_first_complete_then_the_longest_then_the_lowest() {
        let mut first = StopMatcher::new(strings(&["abcd", "bc"]));
        assert_eq!(first.push("abcd"), StopOutput { text: "a".into(), matched: Some(1) });
        let mut longest = StopMatcher::new(strings(&["c", "bc", "abc"]));
        assert_eq!(longest.push("abc"), StopOutput { text: String::new(), matched: Some(2) });
        let mut lowest = StopMatcher::new(strings(&["", "x", "x"]));
        assert_eq!(lowest.push("yx"), StopOutput { text: "y".into(), matched: Some(1) });
    }

    #[test]
    fn no_stop_strings_hold_nothing_back() {
        let mut matcher = StopMatcher::new(Vec::new());
        assert_eq!(matcher.push("any text"), StopOutput { text: "any text".into(), matched: None });
    }

    /// 16 stop strings of 512 bytes and a text that almost matches all the time: quadratic work would be 4e9 steps.
    #[test]
    fn near_misses_take_linear_time() {
        let stops = (0..16).map(|i| format!("{}{}", "a".repeat(511), char::from(b'b' + i))).collect();
        let mut matcher = StopMatcher::new(stops);
        let text = "a".repeat(1 << 20);
        let n_shown: usize =
            (0..16).map(|i| matcher.push(&text[i << 16..(i + 1) << 16])).map(|out| out.text.len()).sum();
        assert_eq!(n_shown, (1 << 20) - 511);
        assert_eq!(matcher.push("q").matched, Some(15));
    }

    proptest! {
        #[test]
        fn equals_the_naive_search(
            stops in prop::collection::vec("[abé😀]{0,4}", 0..5),
            pieces in prop::collection::vec("[abé😀]{0,5}", 0..12),
        ) {
            let text: String = pieces.concat();
            let mut matcher = StopMatcher::new(stops.clone());
            let mut shown = String::new();
            let mut pushed = String::new();
            let mut matched = None;
            for piece in &pieces {
                let output = matcher.push(piece);
                pushed.push_str(piece);
                shown.push_str(&output.text);
                matched = output.matched;
                if matched.is_some() {
                    break;
                }
                prop_assert_eq!(pushed.len() - shown.len(), naive_held(&pushed, &stops));
            }
            shown.push_str(&matcher.finish());
            match naive(&text, &stops) {
                Some((start, index)) => {
                    prop_assert_eq!(matched, Some(index));
                    prop_assert_eq!(&shown, &text[..start]);
                }
                None => prop_assert_eq!(shown, text),
            }
        }
    }
}
