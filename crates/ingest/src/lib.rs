//! The pipeline as a library: resolve, validate, append, acknowledge, publish.
