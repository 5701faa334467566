//! Tests of the protocol language from outside.

mod vectors;
