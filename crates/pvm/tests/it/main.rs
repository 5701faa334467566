//! Tests of the protocol language from outside.

mod docs;
mod lang;
mod properties;
mod vectors;
