//! What the log says of the kernel's offloads that are not used.

use wgsep_ipc::Offload;

/// A line of the log about an offload that is not used.
pub fn missing(offload: Offload, without: &[Offload]) -> String {
    let why = if without.contains(&offload) {
        "as --without says"
    } else {
        "because this kernel or interface does not have it"
    };
    format!("going on without {}, more slowly, {why}", offload.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_distinguishes_what_was_chosen_from_what_is_missing() {
        for one in Offload::ALL {
            assert!(missing(one, &[one]).contains("--without"));
            assert!(!missing(one, &[]).contains("--without"));
        }
    }
}
