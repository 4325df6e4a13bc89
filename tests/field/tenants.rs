//! Tenants, declarations and errors: what one of them does stays with it, and words name the cause.
