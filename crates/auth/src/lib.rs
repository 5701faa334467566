//! Sign-in, tokens, passwords, scopes.
