//! The locks and atomics that this crate's threads meet at.
//!
//! They are those of `std`; where `threads.rs` checks what threads may do to each other, they are those of `shuttle`,
//! which decides at each of them who goes on.

#[cfg(not(all(test, feature = "shuttle")))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};

#[cfg(all(test, feature = "shuttle"))]
pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};

/// Locks; a panic elsewhere leaves these values whole, as each is changed in one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
