//! What one account may use at a time, so that none is in the way of another.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use fieldline_model::AccountId;
use parking_lot::{Mutex, RwLock};

use crate::problem::Problem;

/// Seconds over which the rate is averaged: a burst may take that much at once.
const BURST_S: f64 = 10.0;

/// Limits of one account.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TenantLimits {
    pub(crate) requests_per_s_max: u32,
    pub(crate) running_max: u32,
    pub(crate) feeds_max: u32,
}

/// The accounts that have called. As many as there are accounts: only known callers get here.
pub(crate) struct Tenants {
    limits: TenantLimits,
    tenants: RwLock<HashMap<AccountId, Arc<Tenant>>>,
}

/// What an account is using.
pub(crate) struct Tenant {
    bucket: Mutex<Bucket>,
    running: AtomicU32,
    feeds: AtomicU32,
}

struct Bucket {
    left: f64,
    at: Instant,
}

/// A request that is running, or a feed that is open; dropping it gives the place back.
pub(crate) struct Place {
    tenant: Arc<Tenant>,
    feed: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let used = if self.feed { &self.tenant.feeds } else { &self.tenant.running };
        used.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Tenants {
    pub(crate) fn new(limits: TenantLimits) -> Self {
        Self { limits, tenants: RwLock::default() }
    }

    /// Begins a request of `account`.
    pub(crate) fn request(&self, account: AccountId) -> Result<Place, Problem> {
        let tenant = self.tenant(account);
        let rate = f64::from(self.limits.requests_per_s_max);
        tenant.bucket.lock().take(rate)?;
        take(&tenant.running, self.limits.running_max, "requests running at once")?;
        Ok(Place { tenant, feed: false })
    }

    /// Opens a live feed of `account`.
    pub(crate) fn feed(&self, account: AccountId) -> Result<Place, Problem> {
        let tenant = self.tenant(account);
        take(&tenant.feeds, self.limits.feeds_max, "live feeds open")?;
        Ok(Place { tenant, feed: true })
    }

    fn tenant(&self, account: AccountId) -> Arc<Tenant> {
        if let Some(tenant) = self.tenants.read().get(&account) {
            return Arc::clone(tenant);
        }
        let full = BURST_S * f64::from(self.limits.requests_per_s_max);
        let fresh = || {
            Arc::new(Tenant {
                bucket: Mutex::new(Bucket { left: full, at: Instant::now() }),
                running: AtomicU32::new(0),
                feeds: AtomicU32::new(0),
            })
        };
        Arc::clone(self.tenants.write().entry(account).or_insert_with(fresh))
    }
}

impl Bucket {
    fn take(&mut self, rate: f64) -> Result<(), Problem> {
        let now = Instant::now();
        let came = now.duration_since(self.at).as_secs_f64() * rate;
        self.left = (self.left + came).min(BURST_S * rate);
        self.at = now;
        if self.left < 1.0 {
            return Err(Problem::too_many(format!(
                "the account sends more than {rate} requests a second; slow down"
            ))
            .retry_after(1));
        }
        self.left -= 1.0;
        Ok(())
    }
}

fn take(used: &AtomicU32, most: u32, what: &str) -> Result<(), Problem> {
    let taken = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
        (used < most).then_some(used + 1)
    });
    match taken {
        Ok(_) => Ok(()),
        Err(_) => Err(Problem::too_many(format!("the account has {most} {what}, the most it may"))
            .retry_after(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_account_at_its_limits_does_not_touch_another() {
        let tenants =
            Tenants::new(TenantLimits { requests_per_s_max: 1, running_max: 2, feeds_max: 1 });
        let (a, b) = (AccountId::from_bytes([1; 16]), AccountId::from_bytes([2; 16]));
        let held = (tenants.request(a).unwrap(), tenants.request(a).unwrap());
        assert!(tenants.request(a).is_err(), "two run already");
        drop(tenants.request(b).unwrap());
        drop(held);
        for _ in 0..7 {
            drop(tenants.request(a).unwrap());
        }
        let error = tenants.request(a).err().unwrap();
        assert!(error.detail().contains("requests a second"), "{error:?}");
        drop(tenants.request(b).unwrap());
        let feed = tenants.feed(a).unwrap();
        assert!(tenants.feed(a).is_err());
        drop(feed);
        drop(tenants.feed(a).unwrap());
    }
}
