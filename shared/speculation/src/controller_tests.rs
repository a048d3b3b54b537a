//! Tests of the choice: tables, the optimum by trying everything, and the account.

use proptest::prelude::*;

use super::*;

fn rich() -> ControllerConfig {
    ControllerConfig { start: 1e9, margins: Margins { enter: 0.0, stay: 0.0 }, ..ControllerConfig::default() }
}

fn load(n_sequences: usize) -> StepLoad {
    StepLoad { n_rows: n_sequences, n_tokens: n_sequences, n_spare_rows: 100 }
}

fn chosen(acceptance: &[Vec<f64>], load: StepLoad, cost: &dyn StepCost) -> Vec<usize> {
    Controller::new(rich()).choose(acceptance, load, 0.0, cost).n_proposed
}

#[test]
fn rows_are_added_while_the_rate_rises() {
    let cheap = |n_rows: usize| 10.0 + 0.1 * n_rows as f64;
    let dear = |n_rows: usize| 10.0 * n_rows as f64;
    let sure = vec![0.9; 6];
    assert_eq!(chosen(std::slice::from_ref(&sure), load(1), &cheap), [6]);
    assert_eq!(chosen(std::slice::from_ref(&sure), load(1), &dear), [0], "as slow as its rows: never");
    assert_eq!(chosen(&[sure.clone(), vec![0.2; 6]], load(2), &cheap), [6, 1]);
    assert_eq!(chosen(&[], load(3), &cheap), [0; 0]);
    assert_eq!(chosen(&[vec![]], load(1), &cheap), [0]);
    assert_eq!(chosen(&[sure], StepLoad { n_spare_rows: 2, ..load(1) }, &cheap), [2]);
}

#[test]
fn a_cliff_is_looked_over() {
    // Two rows cost far more than one, up to eight cost no more than that.
    let cliff = |n_rows: usize| if n_rows == 1 { 10.0 } else { 20.0 };
    assert_eq!(chosen(&[vec![0.95; 7]], load(1), &cliff), [7]);
    assert_eq!(chosen(&[vec![0.4; 7]], load(1), &cliff), [0]);
}

#[test]
fn hysteresis_asks_more_of_a_start_than_of_going_on() {
    let cost = |n_rows: usize| 10.0 + n_rows as f64;
    let config = ControllerConfig { start: 1e9, ..ControllerConfig::default() };
    let mut controller = Controller::new(config);
    // One more row costs 1/11; gains of 2 % are enough to go on, not to begin.
    let between = vec![vec![0.113]];
    assert_eq!(controller.choose(&between, load(1), 0.0, &cost).n_rows(), 1);
    assert_eq!(controller.choose(&[vec![0.05]], load(1), 0.0, &cost).n_rows(), 0);
    assert_eq!(controller.choose(&between, load(1), 0.0, &cost).n_rows(), 0);
    assert_eq!(controller.choose(&[vec![0.2]], load(1), 0.0, &cost).n_rows(), 1);
    assert_eq!(controller.choose(&between, load(1), 0.0, &cost).n_rows(), 1);
}

#[test]
fn what_was_waited_counts() {
    let cost = |n_rows: usize| 10.0 + 0.1 * n_rows as f64;
    let mut controller = Controller::new(rich());
    assert_eq!(controller.choose(&[vec![0.8]], load(1), 5.0, &cost).n_rows(), 1);
    assert_eq!(controller.choose(&[vec![0.8]], load(1), 9.0, &cost).n_rows(), 0);
}

#[test]
fn the_account_bounds_what_is_risked_and_drafting_with_it() {
    let cost = |n_rows: usize| 10.0 + n_rows as f64;
    let config = ControllerConfig { start: 0.3, ..ControllerConfig::default() };
    let mut controller = Controller::new(config);
    // 0.3 of 11 ms: three rows.
    let choice = controller.choose(&[vec![0.9; 8]], load(1), 0.0, &cost);
    assert_eq!(choice.n_rows(), 3);
    controller.settle(&choice, 1, 1, choice.predicted_ms);
    assert_eq!(controller.choose(&[vec![0.9; 8]], load(1), 0.0, &cost).n_rows(), 0);
    assert!(controller.allows_drafting());
    // Plain steps that take longer than they should: something else uses the machine.
    let plain = controller.choose(&[], load(1), 0.0, &cost);
    controller.settle(&plain, 1, 1, 14.0);
    assert!(!controller.allows_drafting());
    for _ in 0..60 {
        let plain = controller.choose(&[], load(1), 0.0, &cost);
        controller.settle(&plain, 1, 1, plain.predicted_ms);
    }
    assert!(controller.allows_drafting(), "allowances have paid for another try");
    // What is earned can be risked.
    let choice = controller.choose(&[vec![0.9; 8]], load(1), 0.0, &cost);
    assert_eq!(choice.n_rows(), 3);
    controller.settle(&choice, 1, 4, choice.predicted_ms);
    assert_eq!(controller.choose(&[vec![0.9; 8]], load(1), 0.0, &cost).n_rows(), 8);
    controller.idle();
    assert_eq!(controller.choose(&[vec![0.9; 8]], load(1), 0.0, &cost).n_rows(), 3, "not in a later period");
}

#[test]
fn a_hopeless_source_is_tried_ever_more_seldom_and_every_sequence_has_its_turn() {
    let cost = |n_rows: usize| 10.0 + n_rows as f64;
    let mut controller = Controller::new(ControllerConfig::default());
    let (mut tried_at, mut tried) = (Vec::new(), [0; 3]);
    for step in 0..1_000 {
        let choice = controller.choose(&[vec![0.01], vec![], vec![0.01]], load(3), 0.0, &cost);
        if choice.n_rows() > 0 {
            tried_at.push(step);
            (0..3).for_each(|i| tried[i] += choice.n_proposed[i]);
        }
        controller.settle(&choice, 3, 3, choice.predicted_ms);
    }
    let gaps: Vec<usize> = tried_at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(gaps, [32, 64, 128, 256], "{tried_at:?}");
    assert!(tried[0] >= 2 && tried[1] == 0 && tried[2] >= 2, "{tried:?}");
}

#[test]
fn predicted_and_actual_are_exported() {
    let cost = |n_rows: usize| 10.0 * n_rows as f64;
    let mut controller = Controller::new(rich());
    let choice = Choice { n_proposed: vec![2], expected_tokens: 2.5, predicted_ms: 14.0, plain_ms: 10.0 };
    let _ = controller.choose(&[], load(1), 0.0, &cost);
    controller.settle(&choice, 1, 3, 16.0);
    let Forecast { n_steps, n_speculative, expected_tokens, tokens, predicted_ms, ms, plain_ms } =
        controller.forecast();
    assert_eq!((n_steps, n_speculative, expected_tokens, tokens), (1, 1, 2.5, 3.0));
    assert_eq!((predicted_ms, ms, plain_ms), (14.0, 16.0, 30.0));
}

proptest! {
    /// No other numbers of proposals promise more.
    #[test]
    fn the_choice_is_the_best_of_all(
        acceptance in prop::collection::vec(prop::collection::vec(0.0f64..1.0, 0..4), 0..4),
        steps in prop::collection::vec(0.0f64..3.0, 20),
    ) {
        let cost = |n_rows: usize| 5.0 + steps[..n_rows].iter().sum::<f64>();
        let n = acceptance.len().max(1);
        let choice = Controller::new(rich()).choose(&acceptance, load(n), 0.0, &cost);
        let rate = |n_proposed: &[usize]| {
            let expected = |(acceptance, n): (&Vec<f64>, &usize)| {
                (1..=*n).map(|n| acceptance[..n].iter().product::<f64>()).sum::<f64>()
            };
            let tokens = n as f64 + acceptance.iter().zip(n_proposed).map(expected).sum::<f64>();
            tokens / cost(n + n_proposed.iter().sum::<usize>())
        };
        let mut all = vec![vec![]];
        for acceptance in &acceptance {
            let longer = |one: &Vec<usize>| {
                let one = one.clone();
                (0..=acceptance.len()).map(move |n| [one.clone(), vec![n]].concat())
            };
            all = all.iter().flat_map(longer).collect();
        }
        let best = all.iter().map(|one| rate(one)).fold(0.0, f64::max);
        prop_assert!(rate(&choice.n_proposed) >= best - 1e-9, "{choice:?} gives less than {best}");
    }
}
