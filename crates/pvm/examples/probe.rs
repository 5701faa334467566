#![allow(missing_docs, clippy::all, clippy::print_stdout, clippy::unwrap_used, reason="scratch")]
fn main() {
    for (name, source) in fieldline_pvm::library::built_in() {
        match fieldline_pvm::compile(name, source) {
            Ok(p) => { if std::env::args().nth(1).as_deref()==Some(name) { println!("{}", p.disassemble()); } else { println!("{name} ok"); } }
            Err(e) => println!("{e}"),
        }
    }
}
