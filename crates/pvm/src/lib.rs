//! The protocol language: parser, checker, formatter, compiler and virtual machine.
