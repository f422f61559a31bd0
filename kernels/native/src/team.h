/* A leader that shares one job after the other with followers who wait for them. Knows no threads' making.
 *
 * Everything is in one word: the job's number, whether it is open, and how many followers are in it. A follower
 * comes in only while the job is open, and the leader waits only for those that came in: one that has no core
 * at the time holds nobody up. Who waits looks for some microseconds, then sleeps and leaves the core to others.
 */
#ifndef PS_TEAM_H
#define PS_TEAM_H

#include "types.h"

#include <sched.h>
#include <stdatomic.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum {
    TEAM_INSIDE = 0x3ff, /* followers in the job */
    TEAM_OPEN = 0x400,
    TEAM_ENDED = 0x800,
    TEAM_NUMBER = 0x1000, /* the lowest bit of the job's number */
    TEAM_LOOKS = 2000     /* before sleeping; some 30 us */
};

struct team {
    _Alignas(64) _Atomic uint32_t state;
    _Alignas(64) atomic_int sleepers;
    void (*work)(void *job); /* ends when the job has no more to take */
    void *job;
};

PS_INLINE void team_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Until the state is no longer `seen`, or for no reason. */
static void team_sleep(struct team *team, uint32_t seen) {
#if defined(__linux__)
    atomic_fetch_add(&team->sleepers, 1);
    syscall(SYS_futex, &team->state, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
    atomic_fetch_sub(&team->sleepers, 1);
#else
    (void)team, (void)seen;
    sched_yield();
#endif
}

/* After every change of the state that somebody may wait for. */
PS_INLINE void team_wake(struct team *team) {
#if defined(__linux__)
    if (atomic_load(&team->sleepers))
        syscall(SYS_futex, &team->state, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
#else
    (void)team;
#endif
}

/* Runs work(job) on this thread, the leader's, and on the followers that are there. */
static void team_share(struct team *team, void (*work)(void *), void *job) {
    team->work = work;
    team->job = job;
    uint32_t state = atomic_load(&team->state); /* closed and empty */
    atomic_store(&team->state, (state + TEAM_NUMBER) | TEAM_OPEN);
    team_wake(team);
    work(job);
    state = atomic_fetch_and(&team->state, ~(uint32_t)TEAM_OPEN) & ~(uint32_t)TEAM_OPEN;
    for (int looks = 0; state & TEAM_INSIDE; state = atomic_load(&team->state))
        looks++ < TEAM_LOOKS ? team_pause() : team_sleep(team, state);
}

/* Works on the leader's jobs until the end. */
static void team_follow(struct team *team) {
    uint32_t last = 0;
    for (int looks = 0;;) {
        uint32_t state = atomic_load(&team->state);
        if (state & TEAM_ENDED)
            return;
        if (!(state & TEAM_OPEN) || state / TEAM_NUMBER == last) {
            looks++ < TEAM_LOOKS ? team_pause() : team_sleep(team, state);
        } else if (atomic_compare_exchange_strong(&team->state, &state, state + 1)) {
            last = state / TEAM_NUMBER;
            looks = 0;
            team->work(team->job);
            if (!((atomic_fetch_sub(&team->state, 1) - 1) & TEAM_INSIDE))
                team_wake(team);
        }
    }
}

static void team_end(struct team *team) {
    atomic_fetch_or(&team->state, TEAM_ENDED);
    team_wake(team);
}

#endif
