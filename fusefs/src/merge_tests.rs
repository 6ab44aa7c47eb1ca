//! Tests of the overlay rules.
