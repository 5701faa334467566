//! PostgreSQL as registry and history, against a real server.

mod registry;

use fieldline_postgres::Settings;
use fieldline_testkit::servers::Postgres;

/// The settings for a server of the test's own.
fn settings(server: &Postgres) -> Settings {
    Settings::new(server.url())
}
