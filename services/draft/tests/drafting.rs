//! What the drafting thread proposes with a real model: exactly what the target says when both are the same model, and
//! whatever else happens around it.

mod support;

use std::collections::BTreeMap;

use paceline_domain::{DraftControl, TokenId};
use paceline_draft::model::OneRank;
use paceline_model::HeadTokens;
use support::{Service, decoder, decoder_for, limits, open, prompt, samplings, target_tokens, tokens_of};

#[test]
fn a_draft_equal_to_the_target_is_always_right() {
    let mut target = decoder(1);
    let mut service = Service::new(1, limits());
    for (i, sampling) in samplings().iter().enumerate() {
        let (session, prompt) = (i as u64, prompt(i as u32));
        let expected = target_tokens(&mut target, (&prompt, &[]), sampling, 24);
        service.open(session, &prompt, sampling, 6);
        let start = prompt.len();
        assert_eq!(service.proposed(session, 0, start, 6), expected[..6], "{sampling:?}");
        // All are accepted, and the free token is what comes next: the chain goes on where it was.
        service.commit(session, 0, start, &expected[..7], 8);
        assert_eq!(service.proposed(session, 0, start + 7, 8), expected[7..15], "{sampling:?}");
        // A part is accepted so far.
        service.commit(session, 0, start + 7, &expected[7..10], 8);
        assert_eq!(service.proposed(session, 0, start + 15, 3), expected[15..18], "{sampling:?}");
    }
}

/// Prompts and histories have tokens that its head is not for: they are read, but never proposed.
#[test]
fn a_head_for_fewer_tokens_proposes_what_the_target_says_of_them() {
    let head = HeadTokens::with(100, &[TokenId(180), TokenId(256)]);
    let mut target = decoder(1);
    let mut service = Service::of(OneRank::with_head(decoder_for(1, &head), head.clone()), limits());
    for (i, sampling) in samplings().iter().enumerate() {
        let (session, prompt) = (i as u64, prompt(2 + i as u32));
        assert!(prompt.iter().any(|token| token.0 >= 100));
        let expected = tokens_of(&head, &mut target, (&prompt, &[]), sampling, 8);
        service.open(session, &prompt, sampling, 6);
        assert_eq!(service.proposed(session, 0, prompt.len(), 6), expected[..6], "{sampling:?}");
        // The target says something that was not proposed.
        let committed = [expected[0], TokenId(150)];
        service.commit(session, 1, prompt.len(), &committed, 4);
        let expected = tokens_of(&head, &mut target, (&prompt, &committed), sampling, 4);
        assert_eq!(service.proposed(session, 1, prompt.len() + 2, 4), expected, "{sampling:?}");
    }
}

#[test]
fn after_a_difference_it_goes_on_as_if_it_had_never_been_wrong() {
    let (mut target, mut service) = (decoder(1), Service::new(1, limits()));
    for (i, sampling) in samplings().iter().enumerate() {
        let (session, prompt) = (i as u64, prompt(3));
        service.open(session, &prompt, sampling, 8);
        let drafted = service.proposed(session, 0, prompt.len(), 8);
        // The target says something else at the third place, then two tokens that were never drafted.
        let other = TokenId((drafted[2].0 + 1) % 256);
        let committed = [drafted[0], drafted[1], other, TokenId(9), TokenId(11)];
        service.commit(session, 1, prompt.len(), &committed, 4);
        let expected = target_tokens(&mut target, (&prompt, &committed), sampling, 4);
        assert_eq!(service.proposed(session, 1, prompt.len() + 5, 4), expected, "{sampling:?}");
    }
}

#[test]
fn sessions_that_share_passes_get_what_each_gets_alone() {
    let n = samplings().len();
    let alone: Vec<Vec<TokenId>> = (0..n)
        .map(|i| {
            let mut service = Service::new(2, limits());
            service.open(1, &prompt(i as u32), &samplings()[i], 7);
            service.proposed(1, 0, prompt(i as u32).len(), 7)
        })
        .collect();
    let mut service = Service::new(2, limits());
    let opens = (0..n).map(|i| open(i as u64, &prompt(i as u32), &samplings()[i], 7));
    service.tell(DraftControl { opens: opens.collect(), ..DraftControl::default() });
    let mut together: BTreeMap<u64, Vec<TokenId>> = BTreeMap::new();
    let mut n_shared = 0;
    while together.len() < n || together.values().any(|tokens| tokens.len() < 7) {
        let frame = service.frame().expect("proposals");
        n_shared += usize::from(frame.proposals.len() > 1);
        for proposal in frame.proposals {
            together.entry(proposal.session).or_default().extend(proposal.tokens.into_iter().map(TokenId));
        }
    }
    assert_eq!(together.into_values().collect::<Vec<_>>(), alone);
    assert!(n_shared > 3, "only {n_shared} passes were shared");
}

#[test]
fn one_bad_session_ends_alone_and_missing_tokens_are_asked_for() {
    let mut service = Service::new(1, limits());
    let sampling = &samplings()[0];
    service.open(1, &prompt(0), sampling, 2);
    service.open(2, &prompt(1), sampling, 2);
    let first = service.proposed(1, 0, prompt(0).len(), 2);
    service.commit(2, 0, prompt(1).len(), &[TokenId(60_000)], 2);
    service.commit(1, 0, prompt(0).len() + 5, &[TokenId(1)], 2);
    let nacks = loop {
        let frame = service.frame().expect("an answer");
        if !frame.nacks.is_empty() {
            break frame.nacks;
        }
    };
    assert_eq!((nacks[0].session, nacks[0].have_len as usize), (1, prompt(0).len()));
    service.commit(1, 0, prompt(0).len(), &first, 2);
    assert_eq!(service.proposed(1, 0, prompt(0).len() + 2, 2).len(), 2);
    // The bad one is not heard any more, but its id may be used again.
    service.commit(2, 0, prompt(1).len(), &[TokenId(1)], 2);
    let again = paceline_domain::DraftOpen { generation: 2, ..open(2, &prompt(1), sampling, 2) };
    service.tell(DraftControl { opens: vec![again], ..DraftControl::default() });
    assert_eq!(service.proposed(2, 0, prompt(1).len(), 2).len(), 2);
}

#[test]
fn a_small_pool_gives_up_idle_sessions_and_serves_them_when_they_come_back() {
    let mut small = limits();
    // Room for one session of the longest prompt.
    small.n_kv_blocks = 5;
    let mut service = Service::new(1, small);
    let (sampling, long) = (&samplings()[1], prompt(4));
    service.open(1, &long, sampling, 3);
    let before = service.proposed(1, 0, long.len(), 3);
    service.open(2, &long, sampling, 3);
    let mut given_up = Vec::new();
    let mut n_proposed = 0;
    while n_proposed < 3 {
        let frame = service.frame().expect("an answer");
        given_up.extend(frame.nacks.iter().map(|nack| (nack.session, nack.have_len)));
        n_proposed += frame.proposals.iter().map(|proposal| proposal.tokens.len()).sum::<usize>();
    }
    assert_eq!(given_up, [(1, 0)]);
    let again = paceline_domain::DraftOpen { generation: 2, ..open(1, &long, sampling, 3) };
    service.tell(DraftControl { opens: vec![again], ..DraftControl::default() });
    assert_eq!(service.proposed(1, 0, long.len(), 3), before);
}

#[test]
fn a_stream_of_nonsense_is_ended() {
    let mut service = Service::new(1, limits());
    for session in 0..200 {
        let bad = open(session, &[TokenId(60_000)], &samplings()[0], 2);
        service.tell(DraftControl { opens: vec![bad], ..DraftControl::default() });
    }
    let ended = service.frame().expect_err("must be ended");
    assert_eq!(ended.code(), tonic::Code::InvalidArgument);
}
