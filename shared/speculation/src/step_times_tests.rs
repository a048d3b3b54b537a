//! What step times learn of machines that are written down here.

use proptest::prelude::*;

use super::*;

/// Keys are read by one row each.
fn load(n_rows: usize, n_keys: usize) -> Load {
    Load { n_rows, n_keys, n_reads: n_keys }
}

fn with_rows(times: &StepTimes, load: Load, n_more: usize) -> f64 {
    times.beside(load).expect("something was measured").ms(n_more)
}

/// A machine: flat up to 8 rows, then half a millisecond a row; a microsecond for 10 keys.
fn true_ms(load: Load) -> f64 {
    (load.n_rows as f64 * 0.5).max(4.0) + load.n_keys as f64 * 1e-4
}

#[test]
fn few_rows_are_told_apart_and_many_by_half_octaves() {
    let classes: Vec<usize> = [1, 2, 15, 16, 17, 23, 24, 31, 32, 47, 48, 100_000].map(class_of).into();
    assert_eq!(classes, [0, 1, 14, 15, 16, 16, 17, 17, 18, 18, 19, N_CLASSES - 1]);
}

#[test]
fn rows_of_a_chunk_look_at_all_keys_up_to_their_own() {
    assert_eq!(Load::rows(0, 3), Load { n_rows: 3, n_keys: 6, n_reads: 3 });
    assert_eq!(Load::rows(10, 2).and(Load::rows(4, 1)), Load { n_rows: 3, n_keys: 28, n_reads: 17 });
    assert_eq!(Load::rows(10, 0), Load::default());
}

#[test]
fn it_learns_the_bend_and_the_cost_of_keys() {
    let mut times = StepTimes::default();
    assert_eq!(times.predict(load(1, 1)), None);
    for i in 0..400 {
        let n_rows = [1, 2, 4, 8, 16, 64, 256][i % 7];
        let seen = load(n_rows, n_rows * (i * 37 % 900));
        times.observe(seen, true_ms(seen), Drafting::Quiet);
    }
    for asked in
        [load(1, 50), load(3, 900), load(6, 5_000), load(12, 4_000), load(40, 9_000), load(200, 90_000)]
    {
        let (found, expected) = (times.predict(asked).unwrap(), true_ms(asked));
        assert!((found / expected - 1.0).abs() < 0.15, "{asked:?}: {found} ms instead of {expected}");
    }
}

#[test]
fn one_disturbed_step_hardly_counts_and_a_lasting_change_does() {
    let mut times = StepTimes::default();
    (0..50).for_each(|_| times.observe(load(1, 10), 4.0, Drafting::Quiet));
    times.observe(load(1, 10), 400.0, Drafting::Quiet);
    assert!(times.predict(load(1, 10)).unwrap() < 4.5);
    (0..200).for_each(|_| times.observe(load(1, 10), 40.0, Drafting::Quiet));
    assert!(times.predict(load(1, 10)).unwrap() > 39.0);
}

#[test]
fn a_change_of_pace_is_one_of_all_steps_of_few_rows() {
    let mut times = StepTimes::default();
    let measure = |times: &mut StepTimes, n_rows: usize, ms: f64| {
        times.observe(load(n_rows, 0), ms, Drafting::Quiet);
    };
    for _ in 0..70 {
        for (n, ms) in [(1, 40.0), (4, 42.0), (8, 64.0), (200, 900.0)] {
            measure(&mut times, n, ms);
        }
    }
    // Memory is twice as fast from now on, and nothing but plain steps is measured.
    (0..80).for_each(|_| measure(&mut times, 1, 20.0));
    let ratio = |n| times.predict(load(n, 0)).unwrap() / times.predict(load(1, 0)).unwrap();
    assert!((ratio(4) - 1.05).abs() < 0.12 && (ratio(8) - 1.6).abs() < 0.18, "{} {}", ratio(4), ratio(8));
    assert_eq!(times.predict(load(200, 0)), Some(900.0), "many rows are bound by something else");
}

#[test]
fn longer_and_longer_texts_at_one_pace_leave_all_classes_where_they_are() {
    let mut times = StepTimes::default();
    for i in 0..3_000 {
        // Texts grow from 40 tokens to 168, again and again; four rows are seen now and then at first.
        let n_rows = if i < 200 && i % 5 == 0 { 4 } else { 1 };
        let load = load(n_rows, n_rows * (40 + i % 128));
        times.observe(load, 30.0 + 0.002 * load.n_keys as f64, Drafting::Quiet);
    }
    for n_rows in [1, 4] {
        let (found, expected) =
            (times.predict(load(n_rows, n_rows * 100)).unwrap(), 30.0 + 0.2 * n_rows as f64);
        assert!((found / expected - 1.0).abs() < 0.05, "{n_rows} rows: {found} ms instead of {expected}");
    }
}

#[test]
fn a_class_that_began_badly_misleads_no_other() {
    let mut times = StepTimes::default();
    (0..60).for_each(|_| times.observe(load(1, 0), 30.0, Drafting::Quiet));
    // The first steps of four rows were disturbed.
    (0..3).for_each(|_| times.observe(load(4, 0), 60.0, Drafting::Quiet));
    for _ in 0..4 {
        (0..40).for_each(|_| times.observe(load(4, 0), 31.0, Drafting::Quiet));
        let plain = times.predict(load(1, 0)).unwrap();
        assert!((26.0..31.5).contains(&plain), "{plain}");
        (0..40).for_each(|_| times.observe(load(1, 0), 30.0, Drafting::Quiet));
    }
    let four = times.predict(load(4, 0)).unwrap();
    assert!((29.9..33.0).contains(&four), "{four}");
}

#[test]
fn beyond_what_was_measured_every_row_counts_in_full() {
    let mut times = StepTimes::default();
    times.observe(load(10, 0), 5.0, Drafting::Quiet);
    assert_eq!(times.predict(load(5, 0)), Some(5.0));
    assert_eq!(times.predict(load(40, 0)), Some(20.0));
}

/// One sequence decodes beside a prompt whose rows read its keys together: 0.6 us a key that is read and no longer in a cache, 0.3
/// for each row that looks at it.
fn beside_a_prompt(start_pos: usize, n_rows: usize) -> (Load, f64) {
    let load = Load::rows(100, 1).and(Load::rows(start_pos, n_rows));
    let n_from_memory = load.n_reads.saturating_sub(1_000);
    (load, 2.3 + 0.02 * n_rows as f64 + 6e-4 * n_from_memory as f64 + 3e-4 * load.n_keys as f64)
}

#[test]
fn a_deep_prompt_changes_nothing_of_what_a_step_without_it_takes() {
    let mut times = StepTimes::default();
    for i in 0..100 {
        times.observe(Load::rows(40 + i, 1), 2.36 + 9e-4 * i as f64, Drafting::Quiet);
    }
    let plain = times.predict(Load::rows(100, 1)).unwrap();
    // From many rows a step to one, as it becomes deeper.
    let mut start_pos = 0;
    while start_pos < 6_000 {
        let n_rows = 12usize.saturating_sub(start_pos / 400).max(1 + start_pos % 2);
        let (load, ms) = beside_a_prompt(start_pos, n_rows);
        times.observe(load, ms, Drafting::Quiet);
        start_pos += n_rows;
    }
    let found = times.predict(Load::rows(100, 1)).unwrap();
    assert!((found / plain - 1.0).abs() < 0.15, "{plain} ms before, {found} after");
    for (start_pos, n_rows) in [(5_000, 1), (5_000, 2), (3_000, 3)] {
        let (load, ms) = beside_a_prompt(start_pos, n_rows);
        let found = times.predict(load).unwrap();
        assert!((found / ms - 1.0).abs() < 0.15, "{n_rows} at {start_pos}: {found} instead of {ms} ms");
    }
}

#[test]
fn rows_of_one_class_are_not_taken_for_keys() {
    let mut times = StepTimes::default();
    for i in 0..300 {
        let n_rows = 24 + i * 5 % 8;
        times.observe(load(n_rows, 100 * n_rows), n_rows as f64, Drafting::Quiet);
    }
    let (few, many) = (times.predict(load(28, 0)).unwrap(), times.predict(load(28, 5_600)).unwrap());
    assert!(many / few < 1.1, "{few} ms without keys, {many} with twice as many as usual");
}

#[test]
fn a_cliff_between_few_rows_is_seen() {
    let truth = |n_rows: usize| if n_rows <= 4 { 30.0 } else { 48.0 };
    let mut times = StepTimes::default();
    (0..90).for_each(|i| times.observe(load(1 + i % 9, 0), truth(1 + i % 9), Drafting::Quiet));
    for n_rows in [1, 4, 5, 9] {
        let found = times.predict(load(n_rows, 0)).unwrap();
        assert!((found - truth(n_rows)).abs() < 0.5, "{n_rows} rows: {found} ms");
    }
}

#[test]
fn rows_that_were_never_tried_are_thought_cheap_until_they_are() {
    let mut times = StepTimes::default();
    assert_eq!(times.beside(load(1, 0)).map(|step| step.ms(1)), None);
    times.observe(load(1, 0), 10.0, Drafting::Quiet);
    assert_eq!(with_rows(&times, load(1, 0), 0), 10.0);
    assert_eq!(with_rows(&times, load(1, 0), 3), 11.5);
    times.observe(load(61, 0), 610.0, Drafting::Quiet);
    assert_eq!(with_rows(&times, load(1, 0), 3), 11.5, "a prompt is something else");
    assert!(with_rows(&times, load(1, 0), 4) > 40.0, "but one does not go far without knowing");
    times.observe(load(3, 0), 12.0, Drafting::Quiet);
    assert_eq!(with_rows(&times, load(1, 0), 3), 12.0 * 1.05, "a row more than was measured");
    times.observe(load(4, 0), 40.0, Drafting::Quiet);
    assert_eq!(with_rows(&times, load(1, 0), 3), 40.0);
    assert_eq!(load(2, 30).with_rows(3), Load { n_reads: 30, ..load(3, 45) });
}

#[test]
fn rows_beside_many_cost_no_less_than_those_before() {
    let mut times = StepTimes::default();
    for (n_rows, ms) in [(4, 4.0), (8, 5.0), (16, 9.0), (20, 9.5)] {
        times.observe(load(n_rows, 0), ms, Drafting::Quiet);
    }
    // Half a millisecond for each of the last eight rows.
    assert_eq!(with_rows(&times, load(16, 0), 4), 9.0 + 4.0 * 0.9 * 0.5);
    assert_eq!(with_rows(&times, load(4, 0), 4), 5.0, "a few may be free");
    assert_eq!(times.predict(load(20, 0)), Some(9.5));
}

#[test]
fn steps_beside_a_draft_tell_how_much_slower_they_are_and_nothing_else() {
    let mut times = StepTimes::default();
    (0..9).for_each(|_| times.observe(load(1, 0), 10.0, Drafting::Quiet));
    (0..60).for_each(|_| times.observe(load(1, 0), 15.0, Drafting::Busy));
    assert_eq!(times.predict(load(1, 0)), Some(10.0));
    assert!((times.slowness(Drafting::Busy) - 1.5).abs() < 0.01 && times.slowness(Drafting::Quiet) == 1.0);
    times.observe(load(8, 0), 30.0, Drafting::Busy);
    let eight = times.predict(load(8, 0)).unwrap();
    assert!((eight - 20.0).abs() < 0.2, "{eight}");
    assert!(!times.shows_shared_cores());
}

#[test]
fn a_draft_on_the_same_cores_is_found_out_soon() {
    let mut times = StepTimes::default();
    (0..4).for_each(|_| times.observe(load(1, 0), 10.0, Drafting::Quiet));
    times.observe(load(1, 0), 24.0, Drafting::Busy);
    assert!(times.slowness(Drafting::Busy) > 1.6 && !times.shows_shared_cores(), "once may be an accident");
    (0..5).for_each(|_| times.observe(load(1, 0), 24.0, Drafting::Busy));
    assert!(times.shows_shared_cores());
}

proptest! {
    #[test]
    fn more_work_never_takes_less_time(
        seen in prop::collection::vec((1usize..600, 0usize..100_000, 0.0f64..500.0), 1..60),
        (n_rows, n_keys, more) in (1usize..700, 0usize..100_000, 0usize..100),
    ) {
        let mut times = StepTimes::default();
        seen.into_iter().for_each(|(n_rows, n_keys, ms)| times.observe(load(n_rows, n_keys), ms, Drafting::Quiet));
        let base = times.predict(load(n_rows, n_keys)).unwrap();
        prop_assert!(base.is_finite());
        prop_assert!(times.predict(load(n_rows + more, n_keys)).unwrap() >= base - 1e-9 * base.abs());
        let more = Load { n_keys: n_keys + more, ..load(n_rows, n_keys) };
        prop_assert!(times.predict(more).unwrap() >= base);
    }
}
