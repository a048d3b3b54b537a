//! The thread pool of a shard: one job at a time. Each thread has a share of neighbouring tasks and takes them from the
//! front; who has none left takes some from the back of another's share, so that a thread that is disturbed does not stall
//! the job. The same task of two jobs of one size is at the same thread, unless somebody was disturbed: memory that
//! one job wrote is near the core where the next one reads it. The pool has no queue, no futures, and neither
//! allocates nor locks for a job that finds its workers awake.
//!
//! # Why this is sound
//! A job is a borrowed closure whose address lies in `Shared::job`. Whoever takes a task out of a share owns it, and
//! `run` does not return before every owned task is counted in `n_finished`; so the address is only read while the
//! borrow lives. A worker that is late for one job takes a task of the next, which is as good: what it reads, it
//! reads after taking it.

mod share;
mod slice;

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use share::Share;
pub(crate) use slice::{SharedSlice, StridedMut};

use crate::ahead::Ahead;

/// How long an idle thread looks for work before it sleeps. Waking a sleeper costs about as much.
const SPIN: Duration = Duration::from_micros(40);
/// Looks at the counter between two looks at the clock.
const LOOKS_PER_CLOCK: usize = 64;

/// Stretches of memory a thread's share can begin with.
pub(crate) const N_UPCOMING: usize = 2;
/// Cache lines fetched between two looks for work.
const LINES_PER_LOOK: usize = 8;

/// Threads that all pools of this process keep; more of them than cores must not spin.
static N_POOL_THREADS: AtomicUsize = AtomicUsize::new(0);

/// On which cores the workers of a pool run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pinning {
    /// Wherever the system puts them.
    None,
    /// Thread i runs on the i-th of these cores, cyclically. Thread 0 is the caller, who pins itself with
    /// [`pin_current_thread`].
    Cores(Vec<usize>),
}

/// A fixed number of threads that run the tasks of one job at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    ahead: Ahead,
}

type Task = dyn Fn(usize) + Sync;

#[derive(Clone, Copy)]
struct Job {
    task: *const Task,
    n_tasks: usize,
}

struct Shared {
    /// Written by the caller while no task is owned, read by owners of a task.
    job: UnsafeCell<Option<Job>>,
    /// Counts jobs, each after its shares are set: idle workers watch it.
    n_jobs: AtomicUsize,
    /// The tasks nobody owns yet, a share for each thread, the caller's first.
    shares: Box<[Share]>,
    /// Owned tasks of this job that are done.
    n_finished: AtomicUsize,
    /// A job is running; nested and concurrent jobs run inline on their callers.
    busy: AtomicBool,
    sleepers: Vec<AtomicBool>,
    n_sleepers: AtomicUsize,
    caller_sleeps: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stopping: AtomicBool,
}

// SAFETY: `job` is the only field that is not Sync; the module comment says who touches it when. The closure behind
// it is Sync, so several threads may call it.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is only followed under the protocol of the module comment, on any thread.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool of `n_threads` threads, the caller of [`ThreadPool::run`] being one of them.
    ///
    /// # Panics
    /// When `n_threads` is 0 or the system refuses a thread.
    pub fn new(n_threads: usize, pinning: Pinning) -> Self {
        assert!(n_threads > 0, "invariant: a pool has at least the caller's thread");
        let n_workers = n_threads - 1;
        let shared = Arc::new(Shared::new(n_workers));
        N_POOL_THREADS.fetch_add(n_threads, Ordering::Relaxed);
        let workers = (0..n_workers)
            .map(|worker| {
                let shared = Arc::clone(&shared);
                let core = match &pinning {
                    Pinning::Cores(cores) if !cores.is_empty() => Some(cores[(worker + 1) % cores.len()]),
                    _ => None,
                };
                thread::Builder::new()
                    .name(format!("kernels-{}", worker + 1))
                    .spawn(move || {
                        pin_worker(core);
                        shared.work(worker + 1);
                    })
                    .expect("invariant: the system can start the configured number of threads")
            })
            .collect();
        Self { shared, workers, ahead: Ahead::default() }
    }

    /// Threads that run tasks, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// How far ahead its threads fetch weights.
    pub(crate) fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    /// Calls `task(0) .. task(n_tasks - 1)`, each once, on any threads in any order, and returns when all are
    /// done. A job started inside a task, or while another thread's job runs, is run by its caller alone.
    ///
    /// # Panics
    /// With the panic of a task, after all tasks are done or skipped.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let alone = self.workers.is_empty() || n_tasks < 2 || n_tasks > u32::MAX as usize;
        if alone || shared.busy.swap(true, Ordering::Acquire) {
            (0..n_tasks).for_each(task);
            return;
        }
        shared.publish(task, n_tasks);
        shared.wake(&self.workers, n_tasks - 1);
        shared.run_tasks(0);
        shared.fetch_upcoming(0, &|| shared.n_finished.load(Ordering::Relaxed) == n_tasks);
        shared.wait_finished(n_tasks);
        let panic = shared.take_panic();
        shared.busy.store(false, Ordering::Release);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Says what the shares of a later job begin with, by thread: `(address, bytes)`. A thread that has no task left
    /// fetches it into its caches while it waits for that job. Results do not depend on it.
    pub(crate) fn announce(&self, upcoming: impl Fn(usize) -> [(usize, usize); N_UPCOMING]) {
        for (thread, share) in self.shared.shares.iter().enumerate() {
            for ((address, n_bytes), now) in share.upcoming.iter().zip(upcoming(thread)) {
                address.store(now.0, Ordering::Relaxed);
                n_bytes.store(now.1, Ordering::Relaxed);
            }
        }
    }

    /// Cuts `data` into pieces of `piece_len` (the last may be shorter) and calls `task(piece_idx, piece)` for each.
    pub fn run_pieces<T: Send>(
        &self,
        data: &mut [T],
        piece_len: usize,
        task: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        assert!(piece_len > 0, "invariant: a piece holds something");
        let n = data.len();
        let shared = SharedSlice::new(data);
        self.run(n.div_ceil(piece_len), &|piece| {
            let start = piece * piece_len;
            // SAFETY: the ranges of two pieces are disjoint and each piece index is run once.
            let part = unsafe { shared.range_mut(start..n.min(start + piece_len)) };
            task(piece, part);
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of tasks, so joining cannot fail for a reason a caller could use.
            let _ = worker.join();
        }
        N_POOL_THREADS.fetch_sub(self.shared.sleepers.len() + 1, Ordering::Relaxed);
    }
}

impl Shared {
    fn new(n_workers: usize) -> Self {
        Self {
            job: UnsafeCell::new(None),
            n_jobs: AtomicUsize::new(0),
            shares: (0..=n_workers).map(|_| Share::default()).collect(),
            n_finished: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            sleepers: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            n_sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            caller: Mutex::new(None),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            stopping: AtomicBool::new(false),
        }
    }

    /// Makes a job visible. The caller holds `busy`, and every task of the job before is finished.
    fn publish<'a>(&self, task: &'a (dyn Fn(usize) + Sync + 'a), n_tasks: usize) {
        let task: *const (dyn Fn(usize) + Sync + 'a) = task;
        // SAFETY: only the lifetime changes; the pointer is followed only while `run` holds the borrow.
        let task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), *const Task>(task) };
        let job = Job { task, n_tasks };
        // SAFETY: no task is owned (the job before is finished), so nobody else touches the cell.
        unsafe { *self.job.get() = Some(job) };
        self.n_finished.store(0, Ordering::Relaxed);
        let n_shares = self.shares.len();
        for (idx, share) in self.shares.iter().enumerate() {
            // Publishes the two writes above to whoever takes a task of it.
            share.set(idx * n_tasks / n_shares..(idx + 1) * n_tasks / n_shares);
        }
        // Who sees the new count sees the shares. SeqCst against `n_sleepers`, see `sleep`.
        self.n_jobs.fetch_add(1, Ordering::SeqCst);
    }

    /// Wakes up to `n_wanted` workers that sleep.
    fn wake(&self, workers: &[JoinHandle<()>], n_wanted: usize) {
        if self.n_sleepers.load(Ordering::SeqCst) == 0 {
            return;
        }
        let asleep = self.sleepers.iter().zip(workers).filter(|(flag, _)| flag.swap(false, Ordering::SeqCst));
        asleep.take(n_wanted).for_each(|(_, worker)| worker.thread().unpark());
    }

    /// Runs tasks until none is left to take: first those of the thread's own share, then others'.
    fn run_tasks(&self, thread: usize) {
        let mut n_done = 0;
        while let Some(task_idx) = self.shares[thread].take_first() {
            self.run_task(task_idx);
            n_done += 1;
        }
        let n_shares = self.shares.len();
        for offset in 1..n_shares {
            while let Some(tasks) = self.shares[(thread + offset) % n_shares].take_last() {
                n_done += tasks.len();
                tasks.for_each(|task_idx| self.run_task(task_idx));
            }
        }
        if n_done > 0 {
            self.count(n_done);
        }
    }

    /// Fetches what was announced, once, until `is_over`.
    fn fetch_upcoming(&self, thread: usize, is_over: &dyn Fn() -> bool) {
        for (address, n_bytes) in &self.shares[thread].upcoming {
            let n_bytes = n_bytes.swap(0, Ordering::Relaxed);
            let lines = (address.load(Ordering::Relaxed)..).step_by(64).take(n_bytes.div_ceil(64));
            for (idx, line) in lines.enumerate() {
                if idx % LINES_PER_LOOK == 0 && is_over() {
                    return;
                }
                prefetch_line(line);
            }
        }
    }

    fn run_task(&self, task_idx: usize) {
        // SAFETY: this thread owns a task, so the cell is not written before the task is counted; taking it acquired
        // the write that filled it.
        let job = unsafe { *self.job.get() }.expect("invariant: an owned task belongs to a job");
        // SAFETY: `run` holds the borrow until this task is counted.
        let task = unsafe { &*job.task };
        if !self.panicked.load(Ordering::Relaxed)
            && let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(task_idx)))
        {
            self.keep_panic(payload);
        }
    }

    /// Counts owned tasks that are done. The job is as it was when they were taken: it ends with their count.
    fn count(&self, n_done: usize) {
        // SAFETY: the tasks are not counted yet, so the cell is not written; taking them acquired what filled it.
        let job = unsafe { *self.job.get() }.expect("invariant: an owned task belongs to a job");
        // Release: the caller's acquire of the last count sees everything the tasks wrote. SeqCst against
        // `caller_sleeps`, see `wait_finished`.
        let n_before = self.n_finished.fetch_add(n_done, Ordering::SeqCst);
        if n_before + n_done == job.n_tasks && self.caller_sleeps.load(Ordering::SeqCst) {
            // The handle stays: by now it may be that of the next job's caller, whom a needless unpark does not hurt.
            let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
            caller.as_ref().inspect(|thread| thread.unpark());
        }
    }

    fn keep_panic(&self, payload: Box<dyn Any + Send>) {
        let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(payload);
        // Published to the caller by the count of this task.
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        if !self.panicked.swap(false, Ordering::Relaxed) {
            return None;
        }
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits until every task is counted. The flag and the count form a Dekker pair: either the last finisher sees
    /// the flag and unparks, or this thread sees the last count and does not park.
    fn wait_finished(&self, n_tasks: usize) {
        let done = || self.n_finished.load(Ordering::SeqCst) == n_tasks;
        if spin_until(done) {
            return;
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while !done() {
            thread::park();
        }
        self.caller_sleeps.store(false, Ordering::Relaxed);
    }

    /// Life of a worker, which is this thread of the pool.
    fn work(&self, thread: usize) {
        while !self.stopping.load(Ordering::SeqCst) {
            // Counted before looking: a job that comes later changes it.
            let n_jobs = self.n_jobs.load(Ordering::SeqCst);
            self.run_tasks(thread);
            let awake =
                || self.n_jobs.load(Ordering::Relaxed) != n_jobs || self.stopping.load(Ordering::Relaxed);
            self.fetch_upcoming(thread, &awake);
            if !spin_until(awake) {
                self.sleep(thread - 1, n_jobs);
            }
        }
    }

    /// Sleeps until there is another job than the last one seen. `n_sleepers` and `n_jobs` form a Dekker pair with
    /// `publish` and `wake`: either the caller sees a sleeper, or the worker sees the job.
    fn sleep(&self, worker: usize, n_jobs: usize) {
        let flag = &self.sleepers[worker];
        flag.store(true, Ordering::SeqCst);
        self.n_sleepers.fetch_add(1, Ordering::SeqCst);
        let has_work =
            || self.n_jobs.load(Ordering::SeqCst) != n_jobs || self.stopping.load(Ordering::SeqCst);
        if !has_work() {
            while flag.load(Ordering::SeqCst) && !self.stopping.load(Ordering::SeqCst) {
                thread::park();
            }
        }
        flag.store(false, Ordering::SeqCst);
        self.n_sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Looks for a bounded time; not at all when more pool threads exist than cores, because then the one waited for
/// may need this core.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    if N_POOL_THREADS.load(Ordering::Relaxed) > n_cores() {
        return ready();
    }
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS_PER_CLOCK {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

/// Starts to fetch a cache line into the second-level cache.
fn prefetch_line(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that a program can see, at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

fn n_cores() -> usize {
    static N_CORES: AtomicUsize = AtomicUsize::new(0);
    match N_CORES.load(Ordering::Relaxed) {
        0 => {
            let n_cores = thread::available_parallelism().map_or(1, |n| n.get());
            N_CORES.store(n_cores, Ordering::Relaxed);
            n_cores
        }
        n_cores => n_cores,
    }
}

/// Binds the calling thread to one core.
///
/// # Errors
/// When there is no such core or the system does not let this process use it.
pub fn pin_current_thread(core: usize) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::thread::CpuSet;
        if core >= CpuSet::MAX_CPU {
            return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput));
        }
        let mut cores = CpuSet::new();
        cores.set(core);
        rustix::thread::sched_setaffinity(None, &cores)?;
        Ok(())
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = core;
        Err(std::io::Error::from(std::io::ErrorKind::Unsupported))
    }
}

/// Pinning is advice: a worker that cannot be pinned works where it is.
fn pin_worker(core: Option<usize>) {
    if let Some(core) = core
        && let Err(error) = pin_current_thread(core)
    {
        tracing::warn!(core, %error, "cannot pin a worker thread");
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
