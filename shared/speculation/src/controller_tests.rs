//! Tests of the choice: tables, the optimum by trying everything, and the account.

use proptest::prelude::*;

use super::*;

fn with_start(start: f64) -> ControllerConfig {
    let config = ControllerConfig::default();
    ControllerConfig { rows: AccountConfig { start, ..config.rows }, ..config }
}

fn rich() -> ControllerConfig {
    let margins = Margins { enter: 0.0, stay: 0.0 };
    ControllerConfig { margins, ..with_start(1e9) }
}

fn load(n_sequences: usize) -> StepLoad {
    StepLoad { n_rows: n_sequences, n_tokens: n_sequences, n_spare_rows: 100 }
}

fn chosen(acceptance: &[Vec<f64>], load: StepLoad, cost: &dyn StepCost) -> Vec<usize> {
    Controller::new(rich()).choose(acceptance, load, cost).n_proposed
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
    let mut controller = Controller::new(with_start(1e9));
    // One more row costs 1/11; gains of 2 % are enough to go on, not to begin.
    let between = vec![vec![0.113]];
    assert_eq!(controller.choose(&between, load(1), &cost).n_rows(), 1);
    assert_eq!(controller.choose(&[vec![0.05]], load(1), &cost).n_rows(), 0);
    assert_eq!(controller.choose(&between, load(1), &cost).n_rows(), 0);
    assert_eq!(controller.choose(&[vec![0.2]], load(1), &cost).n_rows(), 1);
    assert_eq!(controller.choose(&between, load(1), &cost).n_rows(), 1);
}

#[test]
fn what_is_done_before_a_step_counts_in_its_promise() {
    let cost = |n_rows: usize| 10.0 + 0.1 * n_rows as f64;
    let promised =
        |before_ms: f64| promise(&[vec![0.8]], load(1), (before_ms, 1e9), &cost).expect("an offer");
    let controller = Controller::new(rich());
    let plain = Promise { n_rows: 0, tokens: 1.0, ms: cost(1) };
    assert!(controller.is_worth_it(&promised(5.0), &plain));
    assert!(!controller.is_worth_it(&promised(9.0), &plain));
    assert_eq!(promise(&[vec![]], load(1), (0.0, 1e9), &cost), None);
    assert_eq!(promise(&[vec![0.8]], load(1), (0.0, 0.05), &cost), None, "not affordable");
}

/// What a step came to whose rows were all that speculation cost.
fn settled(choice: &Choice, n_tokens: usize, rows_ms: f64) -> Settlement {
    let (plain_ms, ms) = (choice.plain_ms, choice.plain_ms + rows_ms);
    Settlement { n_plain_tokens: 1, n_tokens, plain_ms, rows_ms, drafting_ms: 0.0, has_drafted: false, ms }
}

#[test]
fn rows_risk_what_the_account_has() {
    let cost = |n_rows: usize| 10.0 + n_rows as f64;
    let (mut controller, good) = (Controller::new(with_start(0.3)), [vec![0.9; 8]]);
    // 0.3 of 11 ms: three rows.
    let choice = controller.choose(&good, load(1), &cost);
    assert_eq!(choice.n_rows(), 3);
    controller.settle(&choice, &settled(&choice, 1, 3.0));
    assert_eq!(controller.choose(&good, load(1), &cost).n_rows(), 0);
    for _ in 0..60 {
        let plain = controller.choose(&[], load(1), &cost);
        controller.settle(&plain, &settled(&plain, 1, 0.0));
    }
    // Allowances have paid for another try; what is earned can be risked.
    let choice = controller.choose(&good, load(1), &cost);
    assert_eq!(choice.n_rows(), 3);
    controller.settle(&choice, &settled(&choice, 4, 3.0));
    assert_eq!(controller.choose(&good, load(1), &cost).n_rows(), 8);
}

#[test]
fn drafting_pays_for_itself() {
    let cost = |n_rows: usize| 10.0 + n_rows as f64;
    let mut controller = Controller::new(ControllerConfig::default());
    let choice = controller.choose(&[vec![0.9; 3]], load(1), &cost);
    // Ten plain steps at first.
    let settled = settled(&choice, 1, 0.0);
    controller.settle(&choice, &Settlement { drafting_ms: 105.0, ..settled });
    assert!(!controller.drafting().is_exhausted());
    controller.settle(&choice, &Settlement { n_tokens: 9, drafting_ms: 6.5, ..settled });
    assert!(controller.drafting().is_exhausted(), "what its own tokens have won is not for the draft");
    controller.settle(&choice, &Settlement { n_tokens: 9, drafting_ms: 6.5, has_drafted: true, ..settled });
    assert!(!controller.drafting().is_exhausted());
}

#[test]
fn a_hopeless_source_is_tried_ever_more_seldom_and_every_sequence_has_its_turn() {
    let cost = |n_rows: usize| 10.0 + n_rows as f64;
    let mut controller = Controller::new(ControllerConfig::default());
    let (mut tried_at, mut tried) = (Vec::new(), [0; 3]);
    for step in 0..1_000 {
        controller.went_without();
        let choice = controller.choose(&[vec![0.01], vec![], vec![0.01]], load(3), &cost);
        if choice.n_rows() > 0 {
            tried_at.push(step);
            (0..3).for_each(|i| tried[i] += choice.n_proposed[i]);
        }
        let rows_ms = choice.predicted_ms - choice.plain_ms;
        controller
            .settle(&choice, &Settlement { n_plain_tokens: 3, n_tokens: 3, ..settled(&choice, 3, rows_ms) });
    }
    let gaps: Vec<usize> = tried_at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(gaps, [32, 64, 128, 256], "{tried_at:?}");
    assert!(tried[0] >= 2 && tried[1] == 0 && tried[2] >= 2, "{tried:?}");
}

#[test]
fn predicted_and_actual_are_exported() {
    let cost = |n_rows: usize| 10.0 * n_rows as f64;
    let mut controller = Controller::new(rich());
    let choice = Choice {
        n_proposed: vec![2],
        n_branches: 0,
        expected_tokens: 2.5,
        predicted_ms: 14.0,
        plain_ms: 10.0,
    };
    let _ = controller.choose(&[], load(1), &cost);
    controller.settle(&choice, &settled(&choice, 3, 6.0));
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
        let choice = Controller::new(rich()).choose(&acceptance, load(n), &cost);
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
