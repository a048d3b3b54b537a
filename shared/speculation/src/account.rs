//! What speculation may lose: an account in milliseconds of plain decoding. It earns what is saved, loses what is wasted,
//! and gets a small allowance with every step. Only what it holds may be risked.

/// Limits of an account, in plain steps.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AccountConfig {
    /// What it has at first; also the most that allowances add up to.
    pub start: f64,
    /// What a step adds to it.
    pub allowance: f64,
    /// The most it can hold.
    pub most: f64,
    /// What a busy period leaves to the next one: at least, at most.
    pub carried: (f64, f64),
}

/// An account.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    config: AccountConfig,
    /// `None` before the first step.
    balance_ms: Option<f64>,
    /// What a plain step took last.
    plain_ms: f64,
    is_exhausted: bool,
}

impl Account {
    /// With what it has at first.
    pub fn new(config: AccountConfig) -> Self {
        Self { config, balance_ms: None, plain_ms: 0.0, is_exhausted: false }
    }

    /// Opens it, if it is not open, when it is known what a plain step takes; milliseconds that may be lost.
    pub fn open(&mut self, plain_ms: f64) -> f64 {
        self.plain_ms = plain_ms;
        *self.balance_ms.get_or_insert(self.config.start * plain_ms)
    }

    /// Milliseconds that may be lost.
    pub fn balance_ms(&self) -> f64 {
        self.balance_ms.unwrap_or(0.0)
    }

    /// Whether all was lost; so it stays until a fifth of what it had at first is there again.
    pub fn is_exhausted(&self) -> bool {
        self.is_exhausted
    }

    /// A step was done that would have taken `plain_ms`; what it has gained, or lost.
    pub fn settle(&mut self, plain_ms: f64, gained_ms: f64) {
        let Some(balance_ms) = self.balance_ms.as_mut() else { return };
        let AccountConfig { start, allowance, most, .. } = self.config;
        // Allowances add up to a little only; what was saved may add up to more.
        let allowance = (start * plain_ms - *balance_ms).clamp(0.0, allowance * plain_ms);
        *balance_ms = (*balance_ms + allowance + gained_ms).min(most * plain_ms);
        let is_low = *balance_ms < 0.2 * start * plain_ms;
        self.is_exhausted = *balance_ms <= 0.0 || (self.is_exhausted && is_low);
    }

    /// What was lost for no fault of its own is given back, as far as the account held no more at first.
    pub fn forgive(&mut self, ms: f64) {
        let most_ms = self.config.start * self.plain_ms;
        if let Some(balance_ms) = self.balance_ms.as_mut().filter(|balance_ms| **balance_ms < most_ms) {
            *balance_ms = (*balance_ms + ms).min(most_ms);
            self.is_exhausted &= *balance_ms < 0.2 * most_ms;
        }
    }

    /// Nothing is left to do. A part of what was earned is for later requests to risk.
    pub fn idle(&mut self) {
        let (least, most) = self.config.carried;
        if let Some(balance_ms) = self.balance_ms.as_mut() {
            *balance_ms = balance_ms.clamp(least * self.plain_ms, most * self.plain_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AccountConfig =
        AccountConfig { start: 0.5, allowance: 0.01, most: 4.0, carried: (0.1, 1.0) };

    #[test]
    fn it_opens_with_something_and_never_holds_too_much() {
        let mut account = Account::new(CONFIG);
        account.settle(10.0, 7.0);
        assert_eq!((account.balance_ms(), account.open(10.0)), (0.0, 5.0));
        account.settle(10.0, 7.0);
        assert_eq!(account.open(10.0), 12.0);
        account.settle(10.0, 700.0);
        assert_eq!(account.balance_ms(), 40.0);
        account.idle();
        assert_eq!(account.balance_ms(), 10.0);
    }

    #[test]
    fn what_is_forgiven_never_makes_it_richer_than_it_was_at_first() {
        let mut account = Account::new(CONFIG);
        account.forgive(3.0);
        assert_eq!(account.balance_ms(), 0.0, "it is not open");
        account.open(10.0);
        account.settle(10.0, -7.0);
        assert!(account.is_exhausted());
        account.forgive(6.0);
        assert!(!account.is_exhausted() && (account.balance_ms() - 4.0).abs() < 1e-9);
        account.forgive(6.0);
        assert_eq!(account.balance_ms(), 5.0);
        account.settle(10.0, 20.0);
        account.forgive(6.0);
        assert_eq!(account.balance_ms(), 25.0, "nothing is missing");
    }

    #[test]
    fn what_is_lost_comes_back_in_small_allowances() {
        let mut account = Account::new(CONFIG);
        account.open(10.0);
        account.settle(10.0, -5.1);
        assert!(account.is_exhausted());
        (0..10).for_each(|_| account.settle(10.0, 0.0));
        assert!(account.is_exhausted() && account.balance_ms() > 0.0, "not at the first milliseconds");
        (0..1).for_each(|_| account.settle(10.0, 0.0));
        assert!(!account.is_exhausted());
        (0..1_000).for_each(|_| account.settle(10.0, 0.0));
        assert_eq!(account.balance_ms(), 5.0);
        account.settle(10.0, -50.0);
        account.idle();
        assert_eq!(account.balance_ms(), 1.0, "each period may try");
    }
}
