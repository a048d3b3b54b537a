//! Tests of the thread pool: every task once, borrowed data, panics, nesting. Nothing here is timed.

use std::sync::atomic::AtomicU32;

use super::*;

fn pools() -> Vec<ThreadPool> {
    [1, 2, 3, 8].into_iter().map(|n_threads| ThreadPool::new(n_threads, Pinning::None)).collect()
}

#[test]
fn every_task_runs_once_in_many_small_jobs() {
    for pool in pools() {
        for round in 0..3_000_usize {
            let n_tasks = round % 17;
            let counts: Vec<AtomicU32> = (0..n_tasks).map(|_| AtomicU32::new(0)).collect();
            pool.run(n_tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "round {round}");
        }
    }
}

#[test]
fn what_tasks_wrote_is_seen_by_the_caller_and_by_the_next_job() {
    for pool in pools() {
        let mut numbers = vec![0_u64; 1_001];
        for round in 1..=300_u64 {
            pool.run_pieces(&mut numbers, 37, &|_, piece| piece.iter_mut().for_each(|n| *n += round));
        }
        assert!(numbers.iter().all(|n| *n == 300 * 301 / 2));
    }
}

#[test]
fn jobs_find_workers_that_fell_asleep() {
    let pool = ThreadPool::new(3, Pinning::None);
    for _ in 0..20 {
        while pool.shared.n_sleepers.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
        // Each task waits for the other two, so all three threads have to come.
        let n_here = AtomicUsize::new(0);
        pool.run(3, &|_| {
            n_here.fetch_add(1, Ordering::SeqCst);
            while n_here.load(Ordering::SeqCst) < 3 {
                thread::yield_now();
            }
        });
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    for pool in pools() {
        for bad in [0, 3, 7] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|task| assert!(task != bad, "task {task} fails"));
            }));
            let payload = caught.expect_err("the task panicked");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(*message, format!("task {bad} fails"));
            let n_run = AtomicUsize::new(0);
            pool.run(9, &|_| {
                n_run.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(n_run.into_inner(), 9);
        }
    }
}

#[test]
fn a_job_inside_a_task_runs() {
    for pool in pools() {
        let n_run = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(5, &|_| {
                n_run.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(n_run.into_inner(), 20);
    }
}

#[test]
fn two_callers_share_a_pool() {
    let pool = ThreadPool::new(2, Pinning::None);
    let n_run = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..500 {
                    pool.run(4, &|_| {
                        n_run.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(n_run.into_inner(), 3 * 500 * 4);
}

#[test]
fn pieces_cover_the_data_in_order() {
    let pool = ThreadPool::new(2, Pinning::None);
    let mut data = [0_usize; 10];
    pool.run_pieces(&mut data, 4, &|piece, part| {
        let len = part.len();
        part.fill(piece * 10 + len);
    });
    assert_eq!(data, [4, 4, 4, 4, 14, 14, 14, 14, 22, 22]);
    pool.run_pieces(&mut [] as &mut [u8], 4, &|_, _| unreachable!("there is no piece"));
}

#[test]
fn pinned_pools_work_and_a_core_that_is_not_there_is_an_error() {
    let pool = ThreadPool::new(2, Pinning::Cores(vec![0, 100_000]));
    let n_run = AtomicUsize::new(0);
    pool.run(6, &|_| {
        n_run.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(n_run.into_inner(), 6);
    assert!(pin_current_thread(100_000).is_err());
    #[cfg(target_os = "linux")]
    thread::spawn(|| pin_current_thread(0)).join().expect("no panic").expect("core 0 is there");
}

#[test]
fn a_thread_that_is_held_up_does_not_hold_up_the_others() {
    let pool = ThreadPool::new(3, Pinning::None);
    for held_up in [0, 40, 99] {
        let n_run = AtomicUsize::new(0);
        // One task waits for all others but those taken together with it.
        pool.run(100, &|task| {
            while task == held_up && n_run.load(Ordering::SeqCst) < 90 {
                thread::yield_now();
            }
            n_run.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(n_run.into_inner(), 100);
    }
}

#[test]
fn what_is_announced_changes_nothing() {
    let pool = ThreadPool::new(2, Pinning::None);
    let data = [1_u8; 1_000];
    for _ in 0..100 {
        pool.announce(|thread| [(data.as_ptr().addr() + thread, 500), (usize::MAX - 10, 64)]);
        let n_run = AtomicUsize::new(0);
        pool.run(6, &|_| {
            n_run.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n_run.into_inner(), 6);
    }
}
