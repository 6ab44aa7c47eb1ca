//! The locks and atomics that this crate's threads meet at.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};

/// Locks; a panic elsewhere leaves these values whole, as each is changed in one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
