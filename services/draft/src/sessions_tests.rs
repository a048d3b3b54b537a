//! Tests of sessions: tables of messages, and random lives beside a plain list of tokens.

use proptest::prelude::*;

use super::*;

const STREAM: StreamId = StreamId(3);
const LIMITS: Limits = Limits { max_sessions: 3, context: 60, n_vocab: 50, max_ahead: 4, n_kv_blocks: 12 };

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

fn open(session: u64, generation: u32, tokens: &[u32]) -> DraftControl {
    let open = DraftOpen {
        session,
        generation,
        tokens: ids(tokens),
        n_prompt: 1,
        sampling: SamplingParams::greedy(),
        budget: 3,
        trace: Default::default(),
    };
    DraftControl { opens: vec![open], ..DraftControl::default() }
}

fn commit(session: u64, epoch: u32, base_len: u32, tokens: &[u32]) -> DraftControl {
    let commit = DraftCommit { session, generation: 1, epoch, base_len, tokens: ids(tokens), budget: 3 };
    DraftControl { commits: vec![commit], ..DraftControl::default() }
}

/// Runs everything that is pending and drafts this token, as a pass would.
fn draft(sessions: &mut Sessions, session: u64, token: u32) {
    let key = (STREAM, session);
    let len = sessions.get(key).expect("live").history().len();
    assert!(sessions.reserve(key, len));
    sessions.computed(key, len);
    let second = (token != 13).then_some(SecondGuess { token: TokenId(token + 1), confidence: 0.2 });
    sessions.drafted(key, Drafted { token: TokenId(token), confidence: 0.5, second });
}

fn answer(sessions: &mut Sessions) -> DraftAnswer {
    sessions.take_answers().remove(&STREAM).unwrap_or_default()
}

/// Epoch, start and tokens of the only proposal.
fn proposed(sessions: &mut Sessions) -> (u32, u32, Vec<u32>) {
    let answer = answer(sessions);
    let [proposal] = answer.proposals.as_slice() else { panic!("{answer:?}") };
    assert_eq!(proposal.tokens.len(), proposal.confidence.len());
    let expected = |token: &TokenId| if token.0 == 13 { *token } else { TokenId(token.0 + 1) };
    let seconds: Vec<TokenId> = proposal.seconds.iter().map(|second| second.token).collect();
    assert_eq!(
        seconds,
        proposal.tokens.iter().map(expected).collect::<Vec<_>>(),
        "itself where there is none"
    );
    (proposal.epoch, proposal.start_pos, proposal.tokens.iter().map(|token| token.0).collect())
}

fn nacks(sessions: &mut Sessions) -> Vec<(u64, u32)> {
    answer(sessions).nacks.iter().map(|nack| (nack.session, nack.have_len)).collect()
}

fn opened(tokens: &[u32]) -> Sessions {
    let mut sessions = Sessions::new(LIMITS);
    sessions.control(STREAM, open(1, 1, tokens));
    sessions
}

#[test]
fn a_match_goes_on_and_a_difference_is_cut_off() {
    let mut sessions = opened(&[1, 2]);
    (3..=5).for_each(|token| draft(&mut sessions, 1, token));
    assert_eq!(proposed(&mut sessions), (0, 2, vec![3, 4, 5]));
    assert!(sessions.waiting().is_empty(), "the budget is used up");
    // Two were accepted; nothing is forgotten, two more may be drafted.
    sessions.control(STREAM, commit(1, 0, 2, &[3, 4]));
    let session = sessions.get((STREAM, 1)).expect("live");
    assert_eq!((session.n_ahead(), session.n_computed(), session.n_committed()), (1, 4, 4));
    draft(&mut sessions, 1, 6);
    assert_eq!(proposed(&mut sessions), (0, 5, vec![6]));
    // The next one differs: both drafted tokens go, and the keys and values behind the difference.
    sessions.control(STREAM, commit(1, 1, 4, &[9]));
    let session = sessions.get((STREAM, 1)).expect("live");
    assert_eq!(session.history().tokens(), ids(&[1, 2, 3, 4, 9]));
    assert_eq!((session.n_ahead(), session.n_computed()), (0, 4));
    draft(&mut sessions, 1, 7);
    assert_eq!(proposed(&mut sessions), (1, 5, vec![7]));
}

#[test]
fn tokens_that_were_never_drafted_are_caught_up_with() {
    let mut sessions = opened(&[1, 2]);
    draft(&mut sessions, 1, 3);
    sessions.control(STREAM, commit(1, 0, 2, &[3, 4, 5, 6]));
    let session = sessions.get((STREAM, 1)).expect("live");
    assert_eq!((session.n_computed(), session.history().len(), session.n_ahead()), (2, 6, 0));
}

#[test]
fn a_new_epoch_has_everything_said_again_and_so_has_an_answer_that_was_not_sent() {
    let mut sessions = opened(&[1, 2]);
    (3..=5).for_each(|token| draft(&mut sessions, 1, token));
    assert_eq!(proposed(&mut sessions), (0, 2, vec![3, 4, 5]));
    sessions.control(STREAM, commit(1, 1, 2, &[3]));
    assert_eq!(proposed(&mut sessions), (1, 3, vec![4, 5]));
    draft(&mut sessions, 1, 6);
    let lost = answer(&mut sessions);
    sessions.unsaid(STREAM, lost);
    assert_eq!(proposed(&mut sessions), (1, 3, vec![4, 5, 6]));
}

#[test]
fn budgets_bound_what_is_drafted_ahead() {
    let mut sessions = opened(&[1]);
    let key = (STREAM, 1);
    let with_budget = |sessions: &mut Sessions, budget| {
        let mut control = commit(1, 0, 1, &[]);
        control.commits[0].budget = budget;
        sessions.control(STREAM, control);
        sessions.waiting() == [key]
    };
    assert!(!with_budget(&mut sessions, 0));
    assert!(with_budget(&mut sessions, 99));
    for token in 0..LIMITS.max_ahead {
        assert_eq!(sessions.waiting(), [key]);
        draft(&mut sessions, 1, token);
    }
    assert!(sessions.waiting().is_empty(), "no more than the service allows");
    // At the end of the context there is no room for another token.
    let mut sessions = opened(&[1; 60]);
    assert!(sessions.waiting().is_empty());
    assert!(!with_budget(&mut sessions, 4));
}

#[test]
fn what_is_missing_is_asked_for() {
    let mut sessions = opened(&[1, 2]);
    sessions.control(STREAM, commit(9, 0, 2, &[3]));
    sessions.control(STREAM, commit(1, 0, 4, &[3]));
    assert_eq!(nacks(&mut sessions), [(9, 0), (1, 2)]);
    sessions.control(STREAM, commit(1, 0, 2, &[3, 4, 5]));
    assert_eq!(nacks(&mut sessions), []);
    // The same again, and a part of it with something new.
    sessions.control(STREAM, commit(1, 0, 2, &[3, 4]));
    sessions.control(STREAM, commit(1, 0, 3, &[4, 5, 6]));
    assert_eq!(sessions.get((STREAM, 1)).expect("live").history().tokens(), ids(&[1, 2, 3, 4, 5, 6]));
    assert_eq!(nacks(&mut sessions), []);
}

#[test]
fn impossible_messages_end_their_session_and_no_other() {
    let bad_bias = {
        let mut control = open(1, 2, &[1]);
        control.opens[0].sampling.logit_bias = vec![(TokenId(3), 1.0), (TokenId(2), 1.0)];
        control
    };
    let bad_sampling = {
        let mut control = open(1, 2, &[1]);
        control.opens[0].sampling.temperature = f32::NAN;
        control
    };
    let cases = [
        commit(1, 0, 2, &[50]),
        commit(1, 0, 1, &[7]),
        commit(1, 0, 2, &[1; 59]),
        open(1, 2, &[50]),
        open(1, 2, &[1; 61]),
        bad_bias,
        bad_sampling,
    ];
    for bad in cases {
        let mut sessions = opened(&[1, 2]);
        sessions.control(STREAM, open(2, 1, &[1]));
        draft(&mut sessions, 1, 5);
        sessions.control(STREAM, bad.clone());
        assert!(sessions.get((STREAM, 1)).is_none(), "{bad:?}");
        assert!(sessions.get((STREAM, 2)).is_some());
        assert_eq!(sessions.n_free_blocks(), LIMITS.n_kv_blocks as usize, "{bad:?}");
        // It is not listened to any more, until its id gets a new life.
        sessions.control(STREAM, commit(1, 0, 2, &[3]));
        assert_eq!(nacks(&mut sessions), []);
        sessions.control(STREAM, open(1, 3, &[1]));
        assert!(sessions.get((STREAM, 1)).is_some());
    }
    let mut sessions = opened(&[1, 2]);
    sessions.control(STREAM, commit(1, 2, 2, &[3]));
    sessions.control(STREAM, commit(1, 1, 3, &[3]));
    assert!(sessions.get((STREAM, 1)).is_none(), "epochs do not fall");
}

#[test]
fn a_stream_of_nothing_but_nonsense_is_hopeless() {
    let mut sessions = Sessions::new(LIMITS);
    for session in 0..=MAX_QUARANTINED as u64 {
        assert!(!sessions.is_hopeless(STREAM));
        sessions.control(STREAM, open(session, 1, &[50]));
    }
    assert!(sessions.is_hopeless(STREAM) && !sessions.is_hopeless(StreamId(4)));
    sessions.leave(STREAM);
    assert!(!sessions.is_hopeless(STREAM));
}

#[test]
fn generations_tell_lives_apart() {
    let mut sessions = opened(&[1, 2]);
    sessions.control(STREAM, open(1, 1, &[9]));
    assert_eq!(
        sessions.get((STREAM, 1)).expect("live").n_committed(),
        2,
        "the same life is not opened twice"
    );
    sessions.control(STREAM, open(1, 2, &[9]));
    sessions.control(STREAM, commit(1, 0, 2, &[3]));
    assert_eq!(sessions.get((STREAM, 1)).expect("live").history().tokens(), ids(&[9]), "of the life before");
    let close = |generation| DraftControl {
        closes: vec![DraftClose { session: 1, generation }],
        ..DraftControl::default()
    };
    sessions.control(STREAM, close(1));
    assert!(sessions.get((STREAM, 1)).is_some());
    sessions.control(STREAM, close(2));
    assert!(sessions.get((STREAM, 1)).is_none());
}

#[test]
fn what_was_computed_is_told_with_the_next_proposal_once() {
    let mut sessions = opened(&[1, 2]);
    let key = (STREAM, 1);
    let told = |sessions: &mut Sessions| answer(sessions).proposals[0].compute_us;
    sessions.took(key, 700);
    assert!(answer(&mut sessions).is_empty(), "nothing was drafted yet");
    sessions.took(key, 300);
    draft(&mut sessions, 1, 3);
    assert_eq!(told(&mut sessions), 1_000);
    sessions.took(key, 50);
    draft(&mut sessions, 1, 4);
    let lost = answer(&mut sessions);
    sessions.unsaid(STREAM, lost);
    sessions.took(key, u32::MAX - 40);
    draft(&mut sessions, 1, 5);
    assert_eq!(told(&mut sessions), u32::MAX);
}

#[test]
fn streams_do_not_see_each_other_and_a_full_house_gives_up_the_idle() {
    let mut sessions = opened(&[1, 2]);
    (3..=5).for_each(|token| draft(&mut sessions, 1, token));
    sessions.control(StreamId(4), open(1, 1, &[7]));
    sessions.control(StreamId(4), open(2, 1, &[8]));
    assert_eq!(sessions.get((StreamId(4), 1)).expect("live").history().tokens(), ids(&[7]));
    // Three sessions are all there may be; the first is idle.
    sessions.control(StreamId(4), open(3, 1, &[8]));
    let answers = sessions.take_answers();
    assert_eq!(answers[&STREAM].nacks, [DraftNack { session: 1, generation: 1, have_len: 0 }]);
    assert!(!answers.contains_key(&StreamId(4)));
    // Now nobody is.
    sessions.control(STREAM, open(5, 1, &[8]));
    assert_eq!(nacks(&mut sessions), [(5, 0)]);
    sessions.leave(StreamId(4));
    assert_eq!(sessions.live().count(), 0);
}

#[derive(Clone, Debug)]
enum Happening {
    Draft(u64, u32),
    /// Commits what was drafted up to here, then these tokens.
    Commit(u64, usize, Vec<u32>, u32),
    Open(u64, Vec<u32>),
    Close(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    let tokens = || prop::collection::vec(0u32..50, 1..20);
    prop_oneof![
        4 => (0u64..4, 0u32..50).prop_map(|(session, token)| Happening::Draft(session, token)),
        3 => (0u64..4, 0usize..5, prop::collection::vec(0u32..50, 0..4), 0u32..6)
            .prop_map(|(session, n, tokens, budget)| Happening::Commit(session, n, tokens, budget)),
        2 => (0u64..4, tokens()).prop_map(|(session, tokens)| Happening::Open(session, tokens)),
        1 => (0u64..4).prop_map(Happening::Close),
    ]
}

proptest! {
    /// What is committed is what the coordinator committed, keys and values never run ahead of the tokens, and blocks are
    /// neither lost nor held twice.
    #[test]
    fn sessions_hold_what_was_committed(happenings in prop::collection::vec(happening(), 0..60)) {
        let mut sessions = Sessions::new(LIMITS);
        let mut committed: BTreeMap<u64, (u32, Vec<u32>)> = BTreeMap::new();
        let mut generation = 0;
        for happening in happenings {
            match happening {
                Happening::Draft(id, token) => {
                    let key = (STREAM, id);
                    if sessions.waiting().contains(&key) {
                        let len = sessions.get(key).expect("waits").history().len();
                        if sessions.reserve(key, len) {
                            draft(&mut sessions, id, token);
                        }
                    }
                }
                Happening::Commit(id, n_accepted, tokens, budget) => {
                    let Some((generation, truth)) = committed.get_mut(&id) else { continue };
                    let drafted = sessions.get((STREAM, id))
                        .map_or(Vec::new(), |session| session.history().tokens()[truth.len()..].to_vec());
                    let accepted = drafted.iter().take(n_accepted).map(|token| token.0);
                    let new: Vec<u32> = accepted.chain(tokens).take(LIMITS.context - truth.len()).collect();
                    let commit = DraftCommit {
                        session: id,
                        generation: *generation,
                        epoch: 0,
                        base_len: truth.len() as u32,
                        tokens: ids(&new),
                        budget,
                    };
                    truth.extend(new);
                    sessions.control(STREAM, DraftControl { commits: vec![commit], ..DraftControl::default() });
                }
                Happening::Open(id, tokens) => {
                    generation += 1;
                    sessions.control(STREAM, open(id, generation, &tokens));
                    committed.insert(id, (generation, tokens));
                }
                Happening::Close(id) => {
                    committed.remove(&id);
                    let close = DraftClose { session: id, generation };
                    sessions.control(STREAM, DraftControl { closes: vec![close], ..DraftControl::default() });
                }
            }
            let mut held = Vec::new();
            for ((_, id), session) in sessions.live() {
                let (_, truth) = &committed[&id];
                prop_assert_eq!(&session.history().tokens()[..session.n_committed()], &ids(truth)[..]);
                prop_assert!(session.n_computed() < session.history().len());
                prop_assert!(session.blocks().len() * BLOCK_POSITIONS >= session.n_computed());
                prop_assert!(session.n_ahead() <= LIMITS.max_ahead as usize);
                held.extend_from_slice(session.blocks());
            }
            for nack in answer(&mut sessions).nacks {
                committed.remove(&nack.session);
            }
            let n_held = held.len();
            held.sort();
            held.dedup();
            prop_assert_eq!(held.len(), n_held, "no block is held twice");
            prop_assert_eq!(n_held + sessions.n_free_blocks(), LIMITS.n_kv_blocks as usize);
        }
    }
}
