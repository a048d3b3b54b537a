//! What speculation brings on simulated machines, and that it never costs more than a little: speeds beside decoding
//! without it, on a clock that is not real.

use std::time::Duration;

use paceline_domain::Speculation;
use paceline_speculation::Source;

use super::{
    DrafterStats, Placement,
    simulation::{Hardware, Request, World},
};

/// Qwen2.5-Coder 1.5B on two cores: four rows take little more than one.
fn step_ms(n_rows: usize) -> f64 {
    match n_rows {
        0..=4 => 30.0,
        5..=8 => 48.0,
        _ => 6.0 * n_rows as f64,
    }
}

/// Its 0.5B draft there.
fn pass_ms(n_rows: usize) -> f64 {
    match n_rows {
        0..=4 => 10.0,
        5..=8 => 16.0,
        _ => 2.0 * n_rows as f64,
    }
}

fn hardware(placement: Placement) -> Hardware {
    Hardware { step_ms, pass_ms, draft_is: placement, placement }
}

fn request(alpha: f64, mode: Speculation) -> Request {
    Request { n_prompt: 40, period: 0, n_tokens: 128, alpha, mode }
}

/// Speeds of several runs, one after the other, beside those of the same without speculation.
async fn speeds(hardware: &Hardware, runs: &[Vec<Request>]) -> (Vec<f64>, DrafterStats) {
    let (mut world, mut plain) = (World::new(hardware.clone()), World::new(hardware.clone()));
    let mut speeds = Vec::new();
    for requests in runs {
        let off = |request: &Request| Request { mode: Speculation::Off, ..request.clone() };
        let off: Vec<Request> = requests.iter().map(off).collect();
        let (plain_ms, ms) = (plain.run(&off).await, world.run(requests).await);
        speeds.push(plain_ms / ms);
    }
    (speeds, world.stats())
}

/// The same request, several times; each run is `n` of them at the same time.
async fn repeated(placement: Placement, n: usize, request: Request) -> (Vec<f64>, DrafterStats) {
    let (speeds, stats) = speeds(&hardware(placement), &vec![vec![request.clone(); n]; 5]).await;
    println!("{placement:?}, {n} x {request:?}: {speeds:.2?}, {stats:?}");
    (speeds, stats)
}

/// Before draft and target took turns, and what reading a prompt costs was an investment, nothing was ever proposed here:
/// the account was empty before the draft had read.
#[tokio::test(start_paused = true)]
async fn a_draft_on_the_same_machine_pays_from_the_first_request_on() {
    for (alpha, least) in [(0.9, 1.45), (0.8, 1.25), (0.7, 1.1)] {
        for mode in [Speculation::Draft, Speculation::Auto] {
            let (speeds, stats) = repeated(Placement::Together, 1, request(alpha, mode)).await;
            assert!(speeds.iter().all(|speed| *speed >= least), "{alpha} {mode:?}: {speeds:.2?}");
            assert!(stats.sources[Source::Draft.idx()].draft_tokens > 300, "{stats:?}");
            assert_eq!(stats.n_late, 0, "no wait is in vain");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_draft_on_its_own_machine_pays_more() {
    for (alpha, least) in [(0.9, 1.7), (0.8, 1.45), (0.7, 1.3)] {
        let (speeds, _) = repeated(Placement::Apart, 1, request(alpha, Speculation::Auto)).await;
        assert!(speeds.iter().all(|speed| *speed >= least), "{alpha}: {speeds:.2?}");
        let (two, _) = repeated(Placement::Apart, 2, request(alpha, Speculation::Auto)).await;
        assert!(two.iter().all(|speed| *speed >= 1.1), "{alpha}: {two:.2?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_pay_is_found_out_once_and_costs_little() {
    for placement in [Placement::Together, Placement::Apart] {
        for alpha in [0.0, 0.1, 0.3, 0.5] {
            for n in [1, 2, 4, 16] {
                let (speeds, _) = repeated(placement, n, request(alpha, Speculation::Auto)).await;
                assert!(
                    speeds[0] >= 0.93,
                    "{placement:?}, {n} of {alpha}: the first pays for trying {speeds:.3?}"
                );
                let later = &speeds[1..];
                assert!(
                    later.iter().all(|speed| *speed >= 0.93),
                    "{placement:?}, {n} of {alpha}: {speeds:.3?}"
                );
                let mean = later.iter().sum::<f64>() / later.len() as f64;
                assert!(mean >= 0.975, "{placement:?}, {n} of {alpha}: {speeds:.3?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_draft_that_is_said_to_be_elsewhere_and_is_not_costs_as_little() {
    let wrong = Hardware { placement: Placement::Apart, ..hardware(Placement::Together) };
    for alpha in [0.0, 0.3, 0.5, 0.7, 0.9] {
        for n in [1, 2, 4, 16] {
            let runs = vec![vec![request(alpha, Speculation::Auto); n]; 5];
            let (speeds, stats) = speeds(&wrong, &runs).await;
            println!("{n} of {alpha}: {speeds:.3?}, {stats:?}");
            assert!(speeds[0] >= 0.85, "{n} of {alpha}: the first finds it out {speeds:.3?}");
            assert!(speeds[1..].iter().all(|speed| *speed >= 0.93), "{n} of {alpha}: {speeds:.3?}");
            let mean = speeds[1..].iter().sum::<f64>() / 4.0;
            // What the first has lost has to come back before a prompt is read; then it is used as well as any.
            let is_good = alpha > 0.8 && n == 1;
            assert!(mean >= if is_good { 1.3 } else { 0.97 }, "{n} of {alpha}: {speeds:.3?}");
            assert!(!is_good || speeds[4] >= 1.45, "{n} of {alpha}: {speeds:.3?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn good_and_bad_texts_in_turn_are_told_apart() {
    let kinds = [0.85, 0.2].map(|alpha| vec![request(alpha, Speculation::Auto)]);
    let runs: Vec<_> = kinds.iter().cycle().take(10).cloned().collect();
    let (speeds, _) = speeds(&hardware(Placement::Together), &runs).await;
    let of = |first: usize| speeds[first..].iter().step_by(2).sum::<f64>() / 5.0;
    assert!(of(0) > 1.15 && of(1) > 0.95 && speeds.iter().all(|speed| *speed > 0.93), "{speeds:.3?}");
}

#[tokio::test(start_paused = true)]
async fn texts_that_repeat_themselves_need_no_draft() {
    for placement in [Placement::Together, Placement::Apart] {
        let repeats = Request { period: 30, ..request(0.3, Speculation::Auto) };
        let (speeds, stats) = repeated(placement, 1, repeats).await;
        assert!(speeds.iter().all(|speed| *speed > 2.5), "{placement:?}: {speeds:.2?}");
        let [draft, ngram] = stats.sources;
        assert!(ngram.draft_tokens > 10 * draft.draft_tokens, "{stats:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_draft_that_stops_costs_one_wait_and_is_used_again_when_it_is_back() {
    let hardware = hardware(Placement::Together);
    let (mut world, mut plain) = (World::new(hardware.clone()), World::new(hardware));
    let good = [request(0.85, Speculation::Draft)];
    let plain_ms = plain.run(&[Request { mode: Speculation::Off, ..good[0].clone() }]).await;
    world.run(&good).await;
    let before = world.stats();
    world.hang(Duration::from_secs(20));
    let ms = [world.run(&good).await, world.run(&good).await];
    let hung = world.stats();
    assert!(ms.iter().all(|ms| plain_ms / ms > 0.93), "{plain_ms} {ms:?}");
    assert_eq!(hung.n_late, before.n_late + 1, "what does not answer is waited for once");
    assert!(!hung.is_in_use && hung.n_breaker_opened > before.n_breaker_opened);
    for _ in 0..9 {
        world.run(&good).await;
    }
    let drafted = |stats: &DrafterStats| stats.sources[Source::Draft.idx()].draft_tokens;
    assert!(world.stats().is_in_use && drafted(&world.stats()) > drafted(&hung) + 200, "{:?}", world.stats());
    assert!(plain_ms / world.run(&good).await > 1.3);
}

#[tokio::test(start_paused = true)]
async fn a_draft_that_was_killed_is_used_within_two_seconds_of_its_return() {
    let good = [request(0.85, Speculation::Auto)];
    let mut waits = Vec::new();
    // It comes back anywhere in a request, the beginning and the end of one included.
    for i in 0..16 {
        let mut world = World::new(hardware(Placement::Together));
        for _ in 0..3 {
            world.run(&good).await;
        }
        world.kill(Duration::from_millis(2_000 + 250 * i));
        for _ in 0..6 {
            world.run(&good).await;
        }
        waits.push(world.used_after().expect("it is used again").as_millis());
    }
    assert!(waits.iter().all(|ms| *ms < 2_000), "{waits:?}");
}

/// A request of so many tokens.
fn of_length(n_tokens: usize, alpha: f64, mode: Speculation) -> Vec<Request> {
    vec![Request { n_tokens, ..request(alpha, mode) }]
}

/// Where good texts were followed by others the draft knows little of, short ones at that, the first ones pay for it.
#[tokio::test(start_paused = true)]
async fn texts_that_the_draft_knows_little_of_are_left_alone_after_one_or_two() {
    for mode in [Speculation::Draft, Speculation::Auto] {
        let kinds = [(128, 0.85), (40, 0.2)].map(|(n_tokens, alpha)| of_length(n_tokens, alpha, mode));
        let runs: Vec<_> = [vec![kinds[0].clone(); 4], vec![kinds[1].clone(); 8]].concat();
        let (speeds, stats) = speeds(&hardware(Placement::Together), &runs).await;
        println!("{mode:?}: {speeds:.3?}, {stats:?}");
        assert!(speeds[..4].iter().all(|speed| *speed > 1.3), "{speeds:.3?}");
        assert!(speeds[4..].iter().all(|speed| *speed > 0.85), "{speeds:.3?}");
        assert!(speeds[6..].iter().all(|speed| *speed > 0.98), "{speeds:.3?}");
    }
}

/// After many texts that the draft knows little of, a good one is found out a few texts later.
#[tokio::test(start_paused = true)]
async fn what_is_left_alone_is_tried_again() {
    let poor = vec![of_length(400, 0.1, Speculation::Auto); 6];
    let good = vec![of_length(400, 0.9, Speculation::Auto); 12];
    let (speeds, stats) = speeds(&hardware(Placement::Together), &[poor, good].concat()).await;
    println!("{speeds:.3?}, {stats:?}");
    assert!(speeds[3..].iter().all(|speed| *speed > 0.98), "{speeds:.3?}");
    assert!(speeds[17] > 1.4, "{speeds:.3?}");
}

/// For one of two requests alone drafting would hardly pay.
#[tokio::test(start_paused = true)]
async fn two_requests_are_drafted_for_together() {
    let (speeds, _) = repeated(Placement::Together, 2, request(0.9, Speculation::Auto)).await;
    assert!(speeds.iter().all(|speed| *speed > 1.2), "{speeds:.3?}");
}

/// Memory becomes twice as slow and fast again while plain steps are all that is measured.
#[tokio::test(start_paused = true)]
async fn a_machine_that_changes_its_pace_is_used_as_well() {
    let hardware = hardware(Placement::Together);
    let (mut world, mut plain) = (World::new(hardware.clone()), World::new(hardware));
    let mut speeds = Vec::new();
    for slowness in [1.0, 1.0, 2.0, 2.0, 1.0, 1.0] {
        for world in [&world, &plain] {
            world.slow_down(slowness);
        }
        // Others, without speculation, come before.
        for mode in [Speculation::Off, Speculation::Auto] {
            let good = of_length(128, 0.85, mode);
            let plain_ms = plain.run(&of_length(128, 0.85, Speculation::Off)).await;
            speeds.push((mode, plain_ms / world.run(&good).await));
        }
    }
    let mut good = speeds.iter().filter(|(mode, _)| *mode == Speculation::Auto);
    assert!(good.all(|(_, speed)| *speed > 1.25), "{speeds:.2?}");
}
