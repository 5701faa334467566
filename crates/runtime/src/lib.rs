//! Configuration, signals, supervision, logs, metrics and TLS.
